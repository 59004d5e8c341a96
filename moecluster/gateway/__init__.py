"""The HTTP gateway: OpenAI's API over routers, in a process of its own that knows neither torch nor Ray."""
