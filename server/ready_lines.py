"""What the terminal shows once the model is ready: the address, and requests that a newcomer can paste."""

import shlex
from dataclasses import dataclass

import orjson

HEADER = "Content-Type: application/json"
# clients read it from their environment, so that no key is on the screen
KEY_HEADER = '-H "Authorization: Bearer $AWQ_SERVE_API_KEY" '


@dataclass(frozen=True)
class ReadyLines:
    """What the lines depend on. quantizable: a model that a quantization job can read."""

    host: str
    port: int
    model_name: str
    has_key: bool
    has_chat: bool
    quantizable: str

    def render(self) -> list[str]:
        """A line of introduction, then one command a line."""
        # greedy: what a small model draws at random may be a poor first impression
        story = {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
        question = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 64,
            "temperature": 0,
        }
        lines = [
            f"Serving {self.model_name} on {self._url()}. Try it from another terminal:",
            self._curl("/v1/completions", story),
            self._curl("/quantize", {"model": self.quantizable}),
        ]
        if self.has_chat:
            lines.insert(2, self._curl("/v1/chat/completions", question))
        return lines

    def _curl(self, path: str, body: dict[str, object]) -> str:
        key = KEY_HEADER if self.has_key else ""
        return f"curl {self._url()}{path} {key}-H '{HEADER}' -d {shlex.quote(orjson.dumps(body).decode())}"

    def _url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host and "[" not in host else f"http://{host}:{self.port}"
