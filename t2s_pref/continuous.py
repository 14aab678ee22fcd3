"""The policy model decoded by transformers' continuous batching: answers enter and leave the batch at every step.

An option for GPUs with flash attention. The tokens are drawn here, with the noise of `choice`, so they are those of
`TransformersEngine` to within rounding; what transformers would log and pass over is raised. Not covered: CUDA graphs
and asynchronous batching, for which a draw must not depend on what it sees, and models on several devices.

torch and transformers are imported when a function here needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2s_pref.engines import TransformersEngine
from t2s_pref.errors import UserError, one_line
from t2s_pref.models import evaluating, free_cached_memory
from t2s_pref.protocol import Answer, Request, Sampled, Work
from t2s_pref.settings import SamplingSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from t2s_pref.turns import Draw, Wanted

logger = logging.getLogger(__name__)

OLDEST = (5, 23)  # of transformers; what is used here is younger than the package's own floor
PAGE = 256  # tokens of a block of keys and values: transformers' default, and what flash attention asks for
OFF = "leave continuous batching off"

# With flash attention and without, where each token meets the keys of the whole batch behind a mask: the most tokens of
# a forward pass, and the most tokens of keys and values.
STEP = {True: 8192, False: 1024}
MOST_HELD = {True: 1 << 20, False: 1 << 15}
MOST_SEQUENCES = 1024


class FailedError(Exception):
    """A candidate did not become an answer: in a few words, why."""


class ContinuousEngine(TransformersEngine):
    """A [`TransformersEngine`] that decodes by transformers' continuous batching; its arguments are the same.

    Raises:
        [`UserError`]: as there, and on first use where continuous batching cannot run the model, or gives other logits
            than a plain forward pass.
    """

    _verified = False

    def identity(self, memo: Path) -> dict[str, Any]:
        """That of the model, and that its answers are rounded in another way."""
        import transformers

        return {**super().identity(memo), "continuous_batching": transformers.__version__}

    def method(self) -> str:
        """How it decodes, for people."""
        return "continuous batching of transformers"

    def holds_once(self) -> bool:
        """Whole blocks of prompts' common beginnings are."""
        return True

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, budget: int
    ) -> Generator[Sampled, None, None]:
        """Every candidate of the requests, once, in the order in which they end.

        Raises:
            [`UserError`]: where a candidate fails, is incomplete, or does not fit into memory alone. What was handed
                over before is right.
        """
        from t2s_pref.choice import Sampling, candidate_key
        from t2s_pref.decoding import out_of_memory
        from t2s_pref.turns import Draw, Wanted

        if not requests:
            return
        model, stops = self._load().model, self._stops_of(requests, settings)
        ends, sampling = self._ends(stops), Sampling.of(settings)
        left = {
            f"{place}/{number}": Wanted(
                place, number, list(request.prompt), candidate_key(request.row_seed, number), request.cap
            )
            for place, request in enumerate(requests)
            for number in request.candidates
        }
        self.work.prompt_asked += sum(len(wanted.prompt) for wanted in left.values())
        with _as_it_was(model), _quiet():
            if not self._verified:
                self._verify(model, max((wanted.prompt for wanted in left.values()), key=len)[:64])
                self._verified = True
            while left:
                held = self._room(model, left, budget)
                try:
                    draw = Draw(dict(left), sampling, ends, self.work)
                    with closing(_decode(model, draw, held, STEP[_has_flash(model)])) as answers:
                        for name, tokens, ended in answers:
                            wanted = left.pop(name)
                            answer = Answer(stops[wanted.place].text(tokens), len(tokens), ended)
                            yield Sampled(wanted.place, wanted.candidate, answer)
                except FailedError as error:
                    raise UserError(
                        f"Continuous batching of {self.base_model!r} has failed: {error}, and {len(left)} candidates "
                        f"are missing; {OFF}. What was sampled is kept."
                    ) from error
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                # Past the handler, whose traceback would keep the failed run's tensors alive.
                if left:
                    self._make_room(left, held)

    def _room(self, model: PreTrainedModel, left: Mapping[str, Wanted], budget: int) -> int:
        """Tokens of keys and values to hold: no more than are needed, and as many as the longest candidate needs."""
        needs = [-(-(len(wanted.prompt) + wanted.cap) // PAGE) for wanted in left.values()]
        within = int(min(budget, self.ceiling, MOST_HELD[_has_flash(model)])) // PAGE
        return PAGE * max(max(needs) + 1, min(sum(needs) + 1, within))

    def _make_room(self, left: Mapping[str, Wanted], held: int) -> None:
        free_cached_memory()
        longest = max(len(wanted.prompt) + wanted.cap for wanted in left.values())
        if held <= longest + 2 * PAGE:
            raise UserError(
                f"Out of memory with a single candidate of up to {longest} tokens; lower --max-new-tokens, use --dtype "
                "bfloat16, a smaller model, or a device with more memory; what was sampled is kept."
            )
        self.ceiling = held // 2
        logger.warning("Out of memory with keys and values of %d tokens; going on with half as many.", held)

    def _verify(self, model: PreTrainedModel, prompt: list[int]) -> None:
        """Refuse a model of which continuous batching does not give the logits of a plain forward pass.

        One whose attention goes past transformers' interface would see its newest tokens only, silently. Two prompts
        are read beside each other and in pieces; the logits of their second tokens must differ from those of a plain
        pass by little of what the context as a whole changes in them.
        """
        import torch
        import transformers

        from t2s_pref.attention import base_of
        from t2s_pref.choice import Sampling
        from t2s_pref.decoding import Ends
        from t2s_pref.turns import Draw, Wanted

        def refusal(reason: str) -> UserError:
            return UserError(f"{self.base_model!r} cannot be decoded by continuous batching: {reason}; {OFF}.")

        def plain(tokens: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=torch.tensor([tokens], device=base.device)).logits[0, -1].float()

        base = base_of(model)
        if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
            raise refusal(f"transformers is {transformers.__version__}, and 5.23 is the first that will do")
        if len(devices := {str(device) for device in getattr(base, "hf_device_map", {}).values()}) > 1:
            raise refusal(f"it is spread over {', '.join(sorted(devices))}")
        if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) and not _has_flash(model):
            raise refusal("without flash attention its soft cap on attention is passed over")
        two = {"0": Wanted(0, 0, prompt, 0, 2), "1": Wanted(1, 0, prompt[len(prompt) // 2 :], 0, 2)}
        draw = Draw(two, Sampling(temperature=0.0), Ends(frozenset()), Work(), watch=1)
        try:
            for name, tokens, _ in list(_decode(model, draw, 8 * PAGE, len(prompt) // 2 + 8)):
                whole = plain(two[name].prompt + tokens[:1])
                error = (draw.watched[name] - whole).norm() / (whole - plain(tokens[:1])).norm()
                if not error < (0.01 if base.dtype == torch.float32 else 0.25):
                    raise FailedError(f"it loses {error:.0%} of what the prompt says")
        except UserError:
            raise
        except Exception as error:  # each model and kernel fails in its own way
            raise refusal(str(error) if isinstance(error, FailedError) else one_line(error)) from error


def _decode(model: PreTrainedModel, draw: Draw, held: int, step: int) -> Iterator[tuple[str, list[int], bool]]:
    """Of each candidate of `draw`, as it ends: its name, its tokens without the end token, and whether it ended.

    Args:
        held: tokens of keys and values to reserve.
        step: most tokens of a forward pass.

    Raises:
        [`FailedError`]: where a candidate fails or is incomplete; a lack of memory is raised as torch has it.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from t2s_pref.attention import base_of
    from t2s_pref.decoding import out_of_memory

    ends, flash = draw.ends, _has_flash(model)
    stop = sorted(ends.tokens) or -1
    longest = max(len(wanted.prompt) + wanted.cap for wanted in draw.wanted.values())
    # The tokens are drawn by `draw`, in the place of all that is made from this configuration or from the model's own,
    # and transformers takes the largest of what it leaves.
    largest = GenerationConfig(do_sample=False, num_return_sequences=1, eos_token_id=stop)
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=held // PAGE,
        max_batch_tokens=step,
        max_requests_per_batch=min(len(draw.wanted), step, MOST_SEQUENCES),
        max_blocks_per_request=-(-longest // PAGE) + 1 if flash else 0,
        auto_switch_to_flash=flash,
        use_cuda_graph=False,
        use_async_batching=False,
        disable_nccl_graph_mixing=False,  # for graphs; it would set an environment variable
        seed=0,  # or it draws one
    )
    manager = base_of(model).init_continuous_batching(generation_config=largest, continuous_batching_config=config)
    if manager.generation_config is not largest:
        raise UserError(
            "The model keeps a manager of continuous batching from an earlier use; remove it with "
            "model.destroy_cached_continuous_batching_manager()."
        )
    manager.logit_processor = draw
    missing = set(draw.wanted)
    turns = base_of(model).register_forward_pre_hook(_after_inputs)
    try:
        # Before the start, so that a lack of memory is an error here, and torch's seed, which it sets, can be put back.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            manager.warmup()
        draw.cache, draw.page = manager.batch_processor.cache, PAGE
        # All before the start too: otherwise the first batches would depend on which thread is faster.
        for name in _in_order(draw.wanted, step):
            wanted = draw.wanted[name]
            manager.add_request(wanted.prompt, request_id=name, max_new_tokens=wanted.cap, eos_token_id=stop)
        manager.start()
        while missing:
            alive = manager.is_running()
            result = manager.get_result(timeout=0.1)
            if result is None and alive:
                continue
            name = result.request_id if result else min(missing)
            tokens = result.generated_tokens if result else []
            cap = draw.wanted[name].cap
            if result is None or result.error is not None:
                problem = f"failed: {' '.join(str(result.error).split())[:300]}" if result else "never came"
            elif name not in missing:
                problem = "came twice"
            elif not tokens or (tokens[-1] not in ends.tokens and len(tokens) != cap):
                problem = f"stopped after {len(tokens)} of {cap} tokens without an end token"
            else:
                missing.remove(name)
                yield name, *ends.cut(draw.wanted[name].place, tokens)[:2]
                continue
            manager.stop(hard_stop=True)  # only then is it known what ended it
            fatal = manager.background_thread_status.fatal_error
            if fatal is not None and out_of_memory(fatal):
                raise fatal
            raise FailedError(f"a candidate {problem}") from fatal
    finally:
        manager.stop(hard_stop=True)
        turns.remove()


def _after_inputs(module: torch.nn.Module, _: Any) -> None:
    """On a GPU, transformers computes in a stream of its own, and does not wait for the inputs it wrote in another."""
    import torch

    if module.device.type == "cuda":
        torch.cuda.current_stream(module.device).wait_stream(torch.cuda.default_stream(module.device))


def _in_order(wanted: Mapping[str, Wanted], step: int) -> Iterator[str]:
    """The rows of one forward pass at a time, like beside like, and the first candidate of each before its others.

    Blocks are shared with sequences that were read in earlier forward passes only.
    """
    rows: dict[int, list[str]] = {}
    for name in sorted(wanted, key=lambda name: (wanted[name].prompt, wanted[name].place, wanted[name].candidate)):
        rows.setdefault(wanted[name].place, []).append(name)
    groups: list[list[list[str]]] = []
    room = 0
    for names in rows.values():
        if room <= 0:
            groups.append([])
            room = step
        groups[-1].append(names)
        room -= len(wanted[names[0]].prompt)
    for group in groups:
        for turn in zip_longest(*group):
            yield from filter(None, turn)


def _has_flash(model: PreTrainedModel) -> bool:
    """Whether transformers can switch the model to flash attention."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    from t2s_pref.attention import base_of

    base = base_of(model)
    return (
        base.device.type == "cuda"
        and base.dtype.itemsize == 2
        and base._supports_flash_attn
        and (is_flash_attn_3_available(kernels_fallback_ok=True) or is_flash_attn_2_available(kernels_fallback_ok=True))
    )


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, and put back; so is the attention, which transformers leaves switched after an error."""
    from t2s_pref.attention import base_of

    base = base_of(model)
    attention = base.config._attn_implementation
    try:
        with evaluating(model):
            yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers logs here, with a traceback, is raised."""
    theirs = logging.getLogger("ContinuousBatchingLogger")
    level = theirs.level
    theirs.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        theirs.setLevel(level)
