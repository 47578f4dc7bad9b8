// What the page does by itself in the browser. Answers with this tab's key, which outlives a reload but not the tab, and
// with the conversation that the browser kept for it.
async () => {
  const inside = (event, selector) => event.target instanceof Element && event.target.closest(selector);
  const box = () => document.querySelector("#box textarea");
  box()?.setAttribute("aria-label", "Message");

  // A server that was started again does not know this page, so the page loads again and brings its conversation along.
  let server = null;
  let lost = false;
  const watch = async () => {
    const found = await fetch("gradio_api/app_id", { cache: "no-store" }).then((answer) => answer.json()).catch(() => null);
    lost = !found;
    server ??= found?.app_id;
    if (found && found.app_id !== server) return location.reload();
    setTimeout(watch, 2000);
  };
  watch();
  // Words that were not sent yet outlive that, and any other loading of the page.
  addEventListener("pagehide", () => sessionStorage.setItem("mmllm-draft", box()?.value ?? ""));
  const draft = sessionStorage.getItem("mmllm-draft");
  if (draft && box() && !box().value) {
    box().value = draft;
    box().dispatchEvent(new Event("input", { bubbles: true }));
  }

  // A message is not sent without the sound that is being recorded or the file that is on its way.
  const note = document.createElement("p");
  note.id = "hold";
  note.setAttribute("role", "status");
  document.querySelector("#box")?.append(note);
  const hold = (event) => {
    const recording = document.querySelector("#box :is([aria-label='Stop recording'], [aria-label='Attach audio'])");
    const uploading = document.querySelector("#box .loader");
    const reasons = [
      recording && "Stop and attach the recording first, or clear it.",
      uploading && "The file is still on its way.",
      lost && "The server does not answer. The page goes on when it is back.",
    ];
    note.textContent = reasons.find(Boolean) ?? "";
    if (note.textContent) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
  };
  const enter = (event) => event.key === "Enter" && !event.shiftKey && inside(event, "#box textarea") && hold(event);
  document.addEventListener("keydown", enter, true);
  document.addEventListener("keypress", enter, true);
  document.addEventListener("click", (event) => inside(event, "#box .submit-button") && hold(event), true);

  // When the button that has the focus goes away (an example, Retry, Undo), the focus goes to the message box.
  let focused = null;
  document.addEventListener("focusin", (event) => (focused = event.target));
  new MutationObserver(() => {
    if (focused && !focused.isConnected && document.activeElement === document.body) {
      focused = null;
      // Not under a finger: the keyboard would cover the answer.
      if (!matchMedia("(pointer: coarse)").matches) box()?.focus({ preventScroll: true });
    }
  }).observe(document.body, { childList: true, subtree: true });

  // Files can be dropped on the conversation too.
  document.addEventListener("dragover", (event) => inside(event, "#chat") && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!inside(event, "#chat") || !event.dataTransfer?.files.length) return;
    event.preventDefault();
    const dropped = new DragEvent("drop", { dataTransfer: event.dataTransfer, cancelable: true });
    document.querySelector("#box .full-container")?.dispatchEvent(dropped);
  });

  // A tab holds a lock named after its key while it lives. A copy of the tab has the same key in its storage, finds the
  // lock taken and draws another key. A page that is loaded again may have to wait a moment for its own last loading.
  const held = (name) =>
    new Promise((resolve) => {
      if (!navigator.locks) return resolve(true);
      const live = () => { resolve(true); return new Promise(() => {}); };
      navigator.locks.request("mmllm-chat " + name, { signal: AbortSignal.timeout(500) }, live).catch(() => resolve(false));
    });
  let key = sessionStorage.getItem("mmllm-chat");
  const copied = !key || !(await held(key));
  if (copied) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    key = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("mmllm-chat", key);
    held(key);
  }
  return [key, await window.mmllmChats.last(copied)];
}
