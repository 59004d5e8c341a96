"""Input of `moecluster batch`, and the check of its output."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.fakes.fake_openai import answer_to


def write_requests(path: Path, prompts: Sequence[str]) -> Path:
    """Writes a request for each prompt; every third one is a chat."""
    with path.open("w") as file:
        for number, prompt in enumerate(prompts):
            chat = number % 3 == 2
            body = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
            url = "/v1/chat/completions" if chat else "/v1/completions"
            request = {"custom_id": f"id of {prompt}", "method": "POST", "url": url, "body": {"model": "m", **body}}
            file.write(json.dumps(request) + "\n")
    return path


def text_of(output: dict[str, Any]) -> str:
    """Returns the text of one line of the output."""
    (choice,) = output["response"]["body"]["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def check_whole(out: Path, prompts: Sequence[str]) -> None:
    """Checks that every request has its own response, once, in the order of the requests."""
    outputs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [output["custom_id"] for output in outputs] == [f"id of {prompt}" for prompt in prompts]
    assert [text_of(output) for output in outputs] == [answer_to(prompt) for prompt in prompts]
