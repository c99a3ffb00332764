"""A bridge to lm-evaluation-harness: our models as one of its own.

    import lm_eval
    from megatron_moe.inference.evaluation.harness import HarnessModel

    lm_eval.simple_evaluate(HarnessModel("runs/quickstart"), tasks=["arc_easy"])

Under torchrun every rank does the same, and each gets the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.convert.models import open_model
from megatron_moe.data.instruction.chat_template import ChatTemplate, find_template
from megatron_moe.data.packed import optional
from megatron_moe.inference.building import build
from megatron_moe.inference.command import join
from megatron_moe.inference.evaluation.command import Answering
from megatron_moe.inference.evaluation.questions import Continuations, Encoder, first_of
from megatron_moe.inference.evaluation.texts import windows
from megatron_moe.inference.layout import inference_experiment
from megatron_moe.inference.prompts import ends_of, hidden_of, tokenizer_of

_LM: Any = optional("lm_eval.api.model", "evaluation", "the bridge to lm-evaluation-harness").LM


class HarnessModel(_LM):
    """Any model that `eval` takes, as lm-evaluation-harness asks one.

    Args:
        path: of the model.
        overrides: its layout, as for `eval`; with more than one rank the program runs under torchrun.
        dtype: `fp32`, `bf16`, or `auto`: what the device is fast in.
        batch: continuations at once.
        max_new_tokens: of tasks that do not say so themselves.

    Raises InputError.
    """

    def __init__(
        self,
        path: str | Path,
        overrides: Sequence[str] = (),
        dtype: str = "auto",
        batch: int = 8,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        device = join()
        model = open_model(path)
        experiment = inference_experiment(model.experiment, overrides)
        tokenizer = tokenizer_of(model)
        generator = build(experiment, model.weights, device, device.resolve_precision(dtype))
        ends = ends_of(model, tokenizer)
        hidden = hidden_of(tokenizer, ends)
        self._answering = Answering(generator, tokenizer, ends, hidden, batch, is_chat=False)
        positions = experiment.model.max_position_embeddings
        assert positions is not None
        self._encoder = Encoder(tokenizer, None, positions, first_of(model))
        self._max_new_tokens, self._path = max_new_tokens, str(path)
        self._template = self._found_template(model.tokenizer.model if model.tokenizer is not None else None)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request's (context, continuation): log-likelihood of the second after the first, and
        whether it is the most likely one."""
        endings = [self._encoder.pair(*request.args) for request in requests]
        return [(answer.log_prob, answer.is_greedy) for answer in self._answering.endings(endings)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each request's (text,): its log-likelihood behind what begins a text, or the end of one. A text
        that is too long is cut into windows that share one token."""
        encoder, length = self._encoder, self._encoder.length
        texts = [[*encoder.before_all, *encoder.tokenizer.encode(request.args[0])] for request in requests]
        cut = [list(windows(ids, length, length - 1)) for ids in texts]
        answers = iter(self._answering.endings([window for own in cut for window in own]))
        return [sum(next(answers).log_prob for _ in own) for own in cut]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each request's (context, settings): how the model goes on, up to one of the texts `until`."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in alike.values():
            settings = requests[numbers[0]].args[1]
            most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", self._max_new_tokens)))
            until = settings.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            draws = settings.get("do_sample", bool(settings.get("temperature")))
            asked = Continuations(
                [
                    self._encoder.fitted(self._encoder.text(requests[number].args[0]), most)
                    for number in numbers
                ],
                stops,
                most,
                float(settings.get("temperature") or 1.0) if draws else 0.0,
                float(settings.get("top_p", 1.0)),
            )
            for number, text in zip(numbers, self._answering.texts(asked), strict=True):
                texts[number] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Under which requests are cached."""
        return self._path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the model's chat template; empty where it has none."""
        return "" if self._template is None or not chat_template else self._template.text

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text up to where an answer begins."""
        if self._template is None:
            raise NotImplementedError(f"{self._path}: has no chat template")
        return self._template.render(chat_history, add_generation_prompt)

    @staticmethod
    def _found_template(tokenizer_file: str | None) -> ChatTemplate | None:
        has_json = tokenizer_file is not None and tokenizer_file.endswith(".json")
        return find_template(tokenizer_file, None) if tokenizer_file is not None and has_json else None
