"""An engine in another process, which is told what to do line by line: for tests of a Hub, a limit on memory, a hash.

The Hub clients read their environment when they are imported, and a limit on memory is for a whole process.
"""

import json
import logging
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from t2s_pref import SamplingSettings, TransformersEngine, UserError
from t2s_pref.protocol import Request

CHATS = [
    [{"role": "user", "content": "How many books are there?"}],
    [{"role": "user", "content": "Who?"}],
]
SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=12, temperature=1, top_p=0.95)


def candidates(engine: TransformersEngine, memo: Path, settings: SamplingSettings = SETTINGS) -> list[list[str]]:
    """Return the texts of a few candidates."""
    engine.identity(memo)
    prompts = engine.encode_chats(CHATS, settings.enable_thinking)
    numbers = range(settings.candidates)
    requests = [
        Request(ids, settings.row_seed(row), numbers, settings.max_new_tokens) for row, ids in enumerate(prompts)
    ]
    return in_order(engine, requests, settings)


def in_order(engine: TransformersEngine, requests: list[Request], settings: SamplingSettings) -> list[list[str]]:
    """The texts that an engine hands over as they end, as the requests have them."""
    texts = {(one.place, one.candidate): one.answer.text for one in engine.sample(requests, settings, 1 << 20)}
    return [[texts[place, number] for number in request.candidates] for place, request in enumerate(requests)]


class Server:
    """What the process does with one line."""

    def __init__(self, memo: str) -> None:
        self.memo = Path(memo)
        self.engine: TransformersEngine | None = None

    def make(self, **arguments: Any) -> None:
        self.engine = TransformersEngine(**arguments)

    def identity(self) -> dict[str, Any]:
        return {
            "identity": self.engine.identity(self.memo),
            "described": self.engine.describe(),
            "origin": self.engine.origin(),
        }

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        self.make(**arguments)
        return self.identity()

    def load(self) -> None:
        self.engine.token_budget()

    def candidates(self, **arguments: Any) -> dict[str, Any]:
        found = self.prepare(**arguments)
        return {**found, "candidates": candidates(self.engine, self.memo)}

    def in_hand(self, base: str, adapter: str) -> str:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        engine = TransformersEngine(model, tokenizer=AutoTokenizer.from_pretrained(base))
        return engine.identity(self.memo)["in_hand"]

    def sample(self, rows: int, length: int, numbers: int, spare: int | None) -> list[list[list[Any]]]:
        """Sample with `spare` more bytes of address space than there are in use now; `None` for no limit."""
        import psutil

        prompts = [[(7 * row + place) % 500 + 3 for place in range(length)] for row in range(rows)]
        requests = [Request(prompt, row, range(numbers), 4, length - 1, 4) for row, prompt in enumerate(prompts)]
        before = resource.getrlimit(resource.RLIMIT_AS)
        if spare is not None:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + spare, before[1]))
        try:
            return in_order(self.engine, requests, SETTINGS)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    """Do what each line says; answer with one."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("t2s_pref").addHandler(handler)
    server = Server(sys.argv[1])
    time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))  # the Hub's clients wait between tries
    for line in sys.stdin:
        name, arguments = json.loads(line)
        said.clear()
        answer: dict[str, Any] = {}
        try:
            answer["result"] = getattr(server, name)(**arguments)
        except UserError as error:
            answer["refused"] = str(error)
        except Exception:
            answer["crashed"] = traceback.format_exc()
        print(json.dumps({**answer, "warnings": list(said)}), flush=True)


class Client:
    """The process, seen from the test. Use it as a context manager."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment = {
            **environment,
            "OMP_NUM_THREADS": "1",
            # What a batch frees goes back at once and no arena keeps a reserve, so that a limit is met each time.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            "PYTHONPATH": f"{HERE.parent}:{HERE}",
        }
        self.command = [sys.executable, str(Path(__file__)), str(folder / "memo.json")]

    def __enter__(self) -> "Client":
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=pipe, stdout=pipe, stderr=quiet, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Return `result` or `refused`, and the `warnings`; a crash is an error here."""
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "crashed" in answer:
            raise AssertionError(answer["crashed"])
        return answer


HERE = Path(__file__).parent

if __name__ == "__main__":
    main()
