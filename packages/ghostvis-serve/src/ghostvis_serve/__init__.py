"""Talk to GhostVis: terminal chat, web chat, an HTTP API in the style of OpenAI."""
