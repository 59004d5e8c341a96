"""The bodies of requests and responses, as OpenAI's clients have them."""
