// Takes the message out of the box: once to be sent, and an empty one for what is typed next.
(message) => [message, { text: "", files: [] }]
