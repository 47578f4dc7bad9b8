// Copies the conversation as text; pictures and sounds by their names.
(messages) => {
  const code = /(```[^]*?(?:```|$)|`[^`\n]+`)/; // inside code nothing was escaped to be shown
  const plain = (text) => text.split(code).map((piece, i) => (i % 2 ? piece : piece.replace(/\\([<!])/g, "$1"))).join("");
  const part = ({ text, file, alt_text }) => (file ? `[${alt_text || file.orig_name || "file"}]` : plain(text ?? ""));
  const said = (messages ?? []).map(({ role, content }) => `${role}: ${[content].flat().map(part).join("\n")}`);
  const button = document.querySelector("#chat [aria-label='Copy conversation']");
  navigator.clipboard?.writeText(said.join("\n\n")).then(() => {
    button?.classList.add("copied");
    setTimeout(() => button?.classList.remove("copied"), 1500);
  });
}
