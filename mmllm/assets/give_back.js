// Puts a message that comes back from the server in front of what has been typed and attached meanwhile.
(message, draft) => {
  if (!message?.text && !message?.files?.length) return [];
  const text = [message.text, draft?.text].filter((words) => words?.trim()).join("\n");
  return [{ text: "", files: [] }, { text, files: [...(message.files ?? []), ...(draft?.files ?? [])] }];
}
