// The conversations that this browser keeps, in its IndexedDB: {id, title, time} in "titles", {id, chat} in "chats"; chat is
// the text that the server packed, media included. A tab holds a lock named after the conversation that it shows, so no
// other tab opens that one too.
window.mmllmChats = (() => {
  const STORES = ["titles", "chats"];
  const CURRENT = "mmllm-conversation";
  const forgotten = new Set();
  let database = null;
  let letGo = () => {};

  const opened = () =>
    (database ??= new Promise((resolve, reject) => {
      const request = indexedDB.open("mmllm", 1);
      request.onupgradeneeded = () => STORES.forEach((name) => request.result.createObjectStore(name, { keyPath: "id" }));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    }));
  // One step on a store. A browser that keeps nothing (some private windows) answers with what is given as "otherwise".
  const step = async (name, mode, act, otherwise) => {
    try {
      const store = (await opened()).transaction(name, mode).objectStore(name);
      return await new Promise((resolve, reject) => {
        const request = act(store);
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
      });
    } catch (error) {
      console.warn("mmllm: chats are not kept:", error);
      return otherwise;
    }
  };
  const titles = async () => (await step("titles", "readonly", (store) => store.getAll(), [])).sort((a, b) => b.time - a.time);
  const chat = async (id) => (await step("chats", "readonly", (store) => store.get(id)))?.chat ?? "";
  const remove = (id) => Promise.all(STORES.map((name) => step(name, "readwrite", (store) => store.delete(id))));
  const show = (id) => {
    sessionStorage.setItem(CURRENT, id);
    letGo();
    navigator.locks?.request("mmllm-conversation " + id, () => new Promise((resolve) => (letGo = resolve)));
  };
  const elsewhere = async () => {
    const { held } = (await navigator.locks?.query()) ?? { held: [] };
    const mine = sessionStorage.getItem(CURRENT);
    return new Set(held.map((lock) => lock.name.replace("mmllm-conversation ", "")).filter((id) => id !== mine));
  };

  return {
    titles,
    chat,
    async put(id, title, text) {
      await step("chats", "readwrite", (store) => store.put({ id, chat: text }));
      await step("titles", "readwrite", (store) => store.put({ id, title, time: Date.now() }));
    },
    // The conversation that this tab showed before it was loaded again; a copy of a tab has none yet.
    async last(copied) {
      const id = copied ? null : sessionStorage.getItem(CURRENT);
      if (copied) sessionStorage.removeItem(CURRENT);
      if (!id) return "";
      show(id);
      return this.kept();
    },
    kept: () => chat(sessionStorage.getItem(CURRENT) ?? ""),
    async keep(text) {
      if (!text) return;
      const { id, title, messages } = JSON.parse(text);
      if (forgotten.has(id)) return;
      if (id !== sessionStorage.getItem(CURRENT)) show(id);
      if (!messages.length) return remove(id);
      await this.put(id, title, text);
      if (forgotten.has(id)) await remove(id); // meanwhile
      for (const old of (await titles()).slice(MAX_CHATS)) await remove(old.id);
    },
    // Deletes the conversation of this tab, also if an answer to it is still on its way.
    async forget() {
      const id = sessionStorage.getItem(CURRENT);
      if (!id) return;
      forgotten.add(id);
      await remove(id);
    },
    // [title and time, id] of the conversations that no tab shows, the latest first.
    async earlier() {
      const taken = await elsewhere();
      const mine = sessionStorage.getItem(CURRENT);
      const when = { dateStyle: "medium", timeStyle: "short" };
      return (await titles())
        .filter(({ id }) => id !== mine && !taken.has(id))
        .map(({ id, title, time }) => [`${title} (${new Date(time).toLocaleString(undefined, when)})`, id]);
    },
    // The conversation to show in this tab from now on.
    async read(id) {
      const found = (await elsewhere()).has(id) ? "" : await chat(id);
      if (found) show(id);
      return found;
    },
    // Deletes all conversations that no tab shows.
    async forgetEarlier() {
      for (const [, id] of await this.earlier()) await remove(id);
    },
  };
})();
