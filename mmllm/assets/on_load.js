// Names the message box for screen readers, and draws this tab's key, which outlives a reload but not the tab.
() => {
  document.querySelector("#box textarea")?.setAttribute("aria-label", "Message");
  let key = sessionStorage.getItem("mmllm-chat");
  if (!key) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    key = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("mmllm-chat", key);
  }
  return key;
}
