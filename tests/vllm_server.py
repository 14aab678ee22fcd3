"""A stand-in for a vLLM server on 127.0.0.1: the part of its HTTP interface that an engine needs, over a real model.

`/v1/models`, `/version` and `/v1/completions` with prompts of token ids; the words of its errors, the fields of its
answers and what it leaves out are those of vLLM 0.32. As there, parameters that a request leaves out are those of a
`generation_config` that would change every answer. Not covered: streaming, chats, n above 1, logprobs, batching.
"""

import json
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import torch
from loopback import Loopback
from transformers import AutoModelForCausalLM, AutoTokenizer

# What Qwen's generation_config sets, exaggerated.
LEAKS = {"temperature": 0.1, "top_p": 0.2, "top_k": 2, "min_p": 0.3, "repetition_penalty": 1.7}
LEAKS |= {"presence_penalty": 1.5, "frequency_penalty": 1.5}


@dataclass
class Fault:
    """What becomes of the next `times` completions (`None`: of all) that `where` picks by their body."""

    what: str
    times: int | None
    where: Callable[[dict[str, Any]], bool]
    status: int = 503
    text: str = "the stand-in was told to fail"
    seconds: float = 0


@dataclass(eq=False)
class VllmServer(Loopback):
    """The server. Use it as a context manager.

    Attributes:
        model: the folder that it serves, under the name `name`.
        loras: names of LoRA modules, which here answer as their base does.
        limit: a cap on answers, as the `max_new_tokens` of a generation_config is.
        bodies: the completions that were asked for, in order; `paths`: all that was; `most`: how many at once.
        abandoned: completions whose client had left before the answer.
    """

    model: str
    name: str = "demo"
    loras: Sequence[str] = ()
    root: str | None = None
    api_key: str | None = None
    owned_by: str = "vllm"
    context: int = 2048
    limit: int | None = None
    faults: list[Fault] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most: int = 0
    abandoned: int = 0

    def __post_init__(self) -> None:
        self.lock, self.changed = Lock(), Condition()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.vllm = self
        self.policy = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        self.policy.generation_config = type(self.policy.generation_config)(
            eos_token_id=self.policy.generation_config.eos_token_id, pad_token_id=0
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.cached: set[tuple[int, ...]] = set()

    def fail(self, status: int, *, times: int | None = None, text: str = "overloaded", where=lambda body: True) -> None:
        """Answer `status`; 200 is an answer that says it was aborted."""
        self.faults.append(Fault("fail", times, where, status=status, text=text))

    def cut(self, *, times: int | None = None, where=lambda body: True, after_headers: bool = False) -> None:
        """Close the connection without an answer, or in the middle of it."""
        self.faults.append(Fault("cut short" if after_headers else "cut", times, where))

    def slow(self, seconds: float, *, times: int | None = None, where=lambda body: True) -> None:
        """Answer only after `seconds`, or not at all where the client leaves before."""
        self.faults.append(Fault("slow", times, where, seconds=seconds))

    def wait_until(self, reached: Callable[[], bool], seconds: float = 20) -> bool:
        """Wait until `reached()`, looked at whenever something begins or ends."""
        with self.changed:
            return self.changed.wait_for(reached, seconds)

    def take_fault(self, body: dict[str, Any]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and fault.where(body):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def cards(self) -> list[dict[str, Any]]:
        base = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": self.owned_by}
        base |= {"root": self.root or str(Path(self.model)), "parent": None, "max_model_len": self.context}
        above = {"parent": self.name, "max_model_len": None}
        return [base] + [base | above | {"id": lora, "root": f"/loras/{lora}"} for lora in self.loras]

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Why vLLM would not take the request."""
        names, prompt = [self.name, *self.loras], body["prompt"]
        if body["model"] not in names:
            return 404, f"The model `{body['model']}` does not exist. Valid aliases: {', '.join(names)}."
        if any(token >= self.policy.config.vocab_size for token in prompt):
            return 400, f"Token id {max(prompt)} is out of vocabulary"
        if body["max_tokens"] + len(prompt) > self.context:
            return 400, f"This model's maximum context length is {self.context} tokens.\nPlease reduce the length."
        if not 0 <= body.get("temperature", 1) <= 2:
            return 400, f"temperature must be in [0, 2], got {body['temperature']}."
        if body.get("top_k", 0) < -1:
            return 400, f"top_k must be 0 (disable), or at least 1, got {body['top_k']}."
        if not -(2**63) <= body.get("seed", 0) < 2**63:
            return 400, "1 validation error:\n  {'loc': 'body.seed'}"
        return None

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request with the model; as a real server does it, but one after the other."""
        how = {name: body.get(name, default) for name, default in LEAKS.items()}
        if how["min_p"] or how["presence_penalty"] or how["frequency_penalty"]:
            raise NotImplementedError("the stand-in has these only where they are off")
        drawing = {"temperature": how["temperature"], "top_p": how["top_p"], "top_k": max(how["top_k"], 0)}
        with self.lock, torch.random.fork_rng([]):
            torch.manual_seed(body["seed"])
            ids = torch.tensor([body["prompt"]])
            drawn = self.policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=how["temperature"] > 0,
                **(drawing if how["temperature"] else {}),
                repetition_penalty=how["repetition_penalty"],
                max_new_tokens=min(body["max_tokens"], self.limit or body["max_tokens"]),
                **({"stop_strings": body["stop"], "tokenizer": self.tokenizer} if body.get("stop") else {}),
            )[0, ids.shape[1] :].tolist()
            cached = len(body["prompt"]) // 16 * 16 if tuple(body["prompt"]) in self.cached else 0
            self.cached.add(tuple(body["prompt"]))
        ended = drawn[-1] == self.policy.generation_config.eos_token_id
        text = self.tokenizer.decode(drawn[:-1] if ended else drawn, skip_special_tokens=body["skip_special_tokens"])
        cuts = [(text.find(stop), stop) for stop in body.get("stop", ()) if stop in text]
        if cuts:
            text, ended = text[: min(cuts)[0]], True
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(drawn)}  # the end token is counted
        details = {"cached_tokens": cached, "created_cache_tokens": None}
        return {
            "object": "text_completion",
            "model": body["model"],
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "stop" if ended else "length"}],
            "usage": {**usage, "total_tokens": sum(usage.values()), "prompt_tokens_details": details},
        }


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def setup(self) -> None:
        super().setup()
        self.vllm: VllmServer = self.server.vllm
        self.vllm.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `paths` has them

    def allowed(self) -> bool:
        self.vllm.paths.append(self.path)
        key = self.vllm.api_key
        if key and self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {key}":
            self.send(401, {"error": "Unauthorized"})
            return False
        return True

    def do_GET(self) -> None:
        if self.allowed():
            if self.path == "/v1/models":
                self.send(200, {"object": "list", "data": self.vllm.cards()})
            elif self.path == "/version" and self.vllm.owned_by == "vllm":
                self.send(200, {"version": "0.32.0"})
            else:
                self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        text = self.rfile.read(length)
        if len(text) < length:  # the client left while it was asking
            self.leave()
            return
        body = json.loads(text)
        if not self.allowed():
            return
        if self.path != "/v1/completions":
            self.send(404, {"detail": "Not Found"})
            return
        self.vllm.bodies.append(body)
        self.count(1)
        try:
            self.complete(body)
        except (BrokenPipeError, ConnectionResetError):
            self.leave()
        finally:
            self.count(-1)

    def count(self, one: int) -> None:
        with self.vllm.changed:
            self.vllm.under_way += one
            self.vllm.most = max(self.vllm.most, self.vllm.under_way)
            self.vllm.changed.notify_all()

    def complete(self, body: dict[str, Any]) -> None:
        fault = self.vllm.take_fault(body)
        if fault is not None and fault.what == "slow":
            # vLLM, too, sees that the client has left, and drops the request
            if select.select([self.connection], [], [], fault.seconds)[0] and not self.connection.recv(
                1, socket.MSG_PEEK
            ):
                self.leave()
                return
        elif fault is not None and fault.what == "fail" and fault.status == 200:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            self.send(200, {"choices": [{"text": "SEL", "finish_reason": "abort"}], "usage": usage})
            return
        elif fault is not None and fault.what == "fail":
            self.send(fault.status, {"error": {"message": fault.text, "type": "Error", "code": fault.status}})
            return
        elif fault is not None:
            if fault.what == "cut short":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if refusal := self.vllm.refusal(body):
            status, message = refusal
            self.send(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})
        else:
            self.send(200, self.vllm.complete(body))

    def leave(self) -> None:
        self.close_connection = True
        with self.vllm.changed:
            self.vllm.abandoned += 1
            self.vllm.changed.notify_all()

    def send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
