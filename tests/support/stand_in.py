"""A server on loopback that speaks the completions protocol, samples from a policy, and has faults."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

KEY = "sk-of-the-test"


class StandIn:
    """Answers as vLLM does. `fault(number, body)` names what is wrong with an answer, or None."""

    def __init__(self, policy: Any, *, name: str = "policy", keyed: bool = False) -> None:
        self.policy, self.name, self.keyed = policy, name, keyed
        self.listed: Any = [{"id": "base"}, {"id": name}]
        self.fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None
        self.raw = False  # log-probabilities before the temperature
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends what sleeps
        self.url = ""

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """One response, a forward of the whole sequence for every token."""
        generator = torch.Generator().manual_seed(body["seed"])
        prompt, ids, logp = body["prompt"], [], []
        while len(ids) < body["max_tokens"] and not set(ids) & set(body["stop_token_ids"]):
            with torch.no_grad():
                logits = self.policy.model(torch.tensor([prompt + ids])).logits[0, -1].double()
            tempered = (logits / body["temperature"]).log_softmax(0)
            token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            ids.append(token)
            logp.append(float((logits.log_softmax(0) if self.raw else tempered)[token]))
        ended = bool(set(ids) & set(body["stop_token_ids"]))
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "text": "of no use",
                    "logprobs": {
                        "tokens": [f"token_id:{x}" for x in ids],
                        "token_logprobs": logp,
                        "top_logprobs": [{f"token_id:{x}": p} for x, p in zip(ids, logp, strict=True)],
                        "text_offset": [0] * len(ids),
                    },
                    "finish_reason": "stop" if ended else "length",
                    "stop_reason": ids[-1] if ended else None,
                    "prompt_token_ids": prompt,
                    "token_ids": ids,
                }
            ],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
        }


def spoiled(found: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """An answer with that fault in its content."""
    choice = found["choices"][0]
    if fault == "out of vocabulary":
        choice["token_ids"][0] = 10**6
        choice["logprobs"]["tokens"][0] = "token_id:1000000"
    elif fault == "another prompt":
        choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 2]
    elif fault == "another adapter":
        found["model"] = "base"
    return found


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """On a free port of loopback, until the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if stand_in.keyed and self.headers.get("Authorization") != f"Bearer {KEY}":
                return self.send(401, b'{"error": "invalid key"}')
            if stand_in.listed is None:
                return self.send(404, b"")
            return self.send(200, json.dumps({"data": stand_in.listed}).encode())

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(text)
            with stand_in.lock:
                stand_in.bodies.append(body)
                stand_in.headers.append(dict(self.headers))
                fault = stand_in.fault(len(stand_in.bodies) - 1, body)
                stand_in.at_once += 1
                stand_in.most_at_once = max(stand_in.most_at_once, stand_in.at_once)
            try:
                self.answer(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with stand_in.lock:
                    stand_in.at_once -= 1

        def answer(self, body: dict[str, Any], fault: str | None) -> None:
            if fault in {"500", "429", "400"}:
                said = f"the engine\\u001b[31m is dead, {self.headers.get('Authorization')}"
                return self.send(int(fault), f'{{"error": {{"message": "{said}"}}}}'.encode())
            if fault == "time-out":
                stand_in.released.wait(20)
                return self.send(500, b"")
            if fault == "no connection":
                self.close_connection = True
                return self.connection.close()
            with stand_in.lock:
                found = spoiled(stand_in.completion(body), fault)
            text = json.dumps(found).encode()
            if fault == "half an answer":
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) // 2])
                self.close_connection = True
                return None
            if fault == "drops":  # one byte after the other, for ever
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while not stand_in.released.wait(0.05):
                    self.wfile.write(b" ")
                return None
            if fault == "too long":
                return self.send(200, text + b" " * 2_000_000)
            if fault == "no JSON":
                return self.send(200, b"<html>proxy</html>")
            time.sleep(0.002)
            return self.send(200, text)

        def send(self, status: int, text: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that hang up
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stand_in
    finally:
        stand_in.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
