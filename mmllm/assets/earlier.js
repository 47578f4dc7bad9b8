// The chats that can be opened, as the choices of a gradio control.
async () => ({ __type__: "update", choices: await window.mmllmChats.earlier(), value: null })
