"""Is the adapter really in the server's answers? Log-probabilities of a running server against local ones.

Any server with OpenAI's completions API is asked for the log-probabilities of some texts: those of the text itself
(``echo``), or, where it cannot give them, those of what it writes greedily. The same tokens are scored locally, by the
base and by the base with the adapter. With d = served - base and t = tuned - base over all tokens, the least-squares
share <d, t> / <t, t> is 1 where the adapter is applied, 0 where it is not, and about 2 where the scaling of a small
change counts twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from midblock import metrics
from midblock.capture.forward import run_blocks
from midblock.capture.scoring import chunks_of_logits
from midblock.data import Batch, load_data, tokenize
from midblock.errors import DataError, ServingError, SettingsError
from midblock.models import LoadedModel, load_model
from midblock.progress import Progress, silent
from midblock.reading import parse_json, shortened
from midblock.results import Answer, Estimate, Table, TableResult
from midblock.settings.base import name_of
from midblock.settings.evaluate import ServingSettings
from midblock.settings.load import LoadSettings
from midblock.stats import bootstrap_weights, percentile_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ServedRow", "ServingCheck", "Verdict", "check_serving", "compare_served", "served_rows"]

FloatArray = npt.NDArray[np.float64]
Verdict = Literal["applied", "not applied", "something else"]
_REPLICATES, _REPLY_BYTES, _NEW_TOKENS = 2000, 64 << 20, 32
_CLOSE, _SHARE, _WHOLE = 0.5, (0.8, 1.25), (0.9, 1.1)


@dataclass(frozen=True)
class ServedRow:
    """What a server said of one text.

    Attributes:
        ids: Token ids, prompt first.
        start: Place of the first token that has a log-probability.
        logprobs: Of the tokens from there on, in nats.
    """

    ids: tuple[int, ...]
    start: int
    logprobs: tuple[float, ...]


@dataclass
class ServingCheck(TableResult):
    """Served log-probabilities beside local ones, token by token."""

    tokens: pd.DataFrame
    """Columns row, place, token (its id), served, base, tuned: log-probabilities in nats."""
    share: Estimate
    """<served - base, tuned - base> / |tuned - base|^2, interval over rows."""
    served: str
    """The server's name of the model."""
    echoed: bool
    """Whether the texts' own tokens were scored, or those that the server wrote."""

    def distance(self, a: str, b: str) -> float:
        """Root mean square difference of two columns of `tokens`, in nats."""
        return float(np.sqrt(np.mean(np.square(self.tokens[a] - self.tokens[b]))))

    @property
    def verdict(self) -> Verdict:
        """``applied``, ``not applied`` (the server answers as the base does), or ``something else``."""
        size = self.distance("tuned", "base")
        whole = math.isnan(self.share.low) or (self.share.low <= _WHOLE[1] and self.share.high >= _WHOLE[0])
        if whole and _SHARE[0] <= self.share.value <= _SHARE[1] and self.distance("served", "tuned") < _CLOSE * size:
            return "applied"
        if self.share.value < 1 - _SHARE[0] and self.distance("served", "base") < _CLOSE * size:
            return "not applied"
        return "something else"

    @property
    def table(self) -> Table:
        """The tidy table: the share and the three distances."""
        table, n = Table(), int(self.tokens["row"].nunique())
        table.add("model", "all", "adapter_share", "pair", self.share)
        for a, b in (("served", "tuned"), ("served", "base"), ("tuned", "base")):
            table.add("model", "all", f"{a}_{b}_rms_nats", "pair", self.distance(a, b), n=n)
        return table

    def answer(self) -> Answer:
        """The verdict and the share that it rests on."""
        s, told = self.share, {
            "applied": "the adapter is applied",
            "not applied": "the adapter is NOT applied: the server answers as the base does",
            "something else": "neither the base nor the base with this adapter (another adapter, scaling or dtype)"}
        too_much = self.verdict == "something else" and s.low > _SHARE[1]
        times = f"; the adapter counts {s.value:.1f} times: compare alpha and rank" if too_much else ""
        return Answer(f"{self.served}: {told[self.verdict]}{times}.",
                      f"Share of the adapter's change in the served log-probabilities: {s.value:.3f} [{s.low:.3f}, "
                      f"{s.high:.3f}] ({s.n} texts, {len(self.tokens)} {'of their' if self.echoed else 'written'} "
                      "tokens; 1 applied, 0 not).")

    def details(self) -> list[str]:
        """How far apart the three are."""
        return ["Root mean square differences in nats per token: "
                f"served to tuned {self.distance('served', 'tuned'):.4f}, served to base "
                f"{self.distance('served', 'base'):.4f}, tuned to base {self.distance('tuned', 'base'):.4f}."]

    def figures(self) -> dict[str, Figure]:
        """The three distances as bars."""
        from midblock.figures import segment_bars

        part = self.frame[self.frame["metric"].str.endswith("nats")].assign(
            layer=lambda f: f["metric"].str.replace("_rms_nats", "").str.replace("_", " to "))
        return {"serving": segment_bars(part, title=f"Log-probabilities of {self.served}",
                                        value_label="root mean square difference (nats per token)")}


def check_serving(url: str, model: str, *, adapter: str, load: LoadSettings | None = None, progress: Progress = silent,
                  settings: ServingSettings | None = None, **overrides: Any) -> ServingCheck:
    """Ask a server for log-probabilities and compare them with those of the base and of the base with an adapter.

    Args:
        url: Of the server, such as ``http://localhost:8000`` (``/v1`` may be there or not). A key is read from
            ``OPENAI_API_KEY``.
        model: MODEL spec of the base.
        adapter: Folder or hub id of the adapter that the server should apply.
        load: How both are loaded; a server in bfloat16 is compared best with ``dtype="bfloat16"``.
        progress: Told how many texts are done.
        settings: See `ServingSettings`.
        **overrides: Single fields of them.

    Raises:
        ServingError: the server cannot be reached, or does not answer as OpenAI's completions API does.
        SettingsError: it serves several models and none was named, or the adapter changes nothing.
        DataError: no usable text.
    """
    chosen, loading = ServingSettings.of(settings, overrides), load or LoadSettings()
    server = _Server(url, chosen.timeout)
    name = server.model(chosen.served_name)
    loaded = load_model(model, adapter=adapter, **loading.model_dump())
    dataset = load_data(chosen.serving_data, seed=0, samples=chosen.serving_samples)
    rows = [row.ids for row in tokenize(dataset, loaded.tokenizer, max_length=chosen.serving_tokens, min_tokens=4).rows]
    if not rows:
        raise DataError(f"{dataset.source} has no text of 4 tokens or more; name other data with "
                        f"{name_of('serving_data')}.")
    served, echoed = served_rows(server, name, rows, loaded, progress)
    if not served:
        raise ServingError(f"{url}: none of {len(rows)} answers could be matched with the tokens of {model}; is the "
                           f"server's model {name} made from it?")
    tuned = local_logprobs(loaded, served)
    base_folder = str(loaded.folder)
    del loaded  # the first model's memory is free before the second comes
    base = local_logprobs(load_model(base_folder, **loading.model_dump()), served)
    return compare_served(served, base, tuned, name=name, echoed=echoed)


def compare_served(served: Sequence[ServedRow], base: Sequence[FloatArray], tuned: Sequence[FloatArray], *,
                   name: str = "server", echoed: bool = True) -> ServingCheck:
    """The comparison, from log-probabilities of the same tokens.

    Raises:
        SettingsError: base and tuned are equal on these tokens.
    """
    frame = pd.concat([pd.DataFrame({"row": i, "place": range(row.start, len(row.ids)), "token": row.ids[row.start:],
                                     "served": row.logprobs, "base": b, "tuned": t})
                       for i, (row, b, t) in enumerate(zip(served, base, tuned, strict=True))], ignore_index=True)
    change, found = frame["tuned"] - frame["base"], frame["served"] - frame["base"]
    parts = pd.DataFrame({"row": frame["row"], "top": change * found, "bottom": change ** 2}).groupby("row").sum()
    top, bottom = parts["top"].to_numpy(np.float64), parts["bottom"].to_numpy(np.float64)
    if not bottom.sum() > 0:
        raise SettingsError("the adapter changes no log-probability of these texts, so that its presence cannot be "
                            "seen; is it trained?")
    value, n = float(top.sum() / bottom.sum()), len(top)
    if n < 2:
        return ServingCheck(frame, Estimate(value, n=n), name, echoed)
    weights = bootstrap_weights(n, _REPLICATES, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (weights @ top) / (weights @ bottom)
    return ServingCheck(frame, percentile_interval(value, draws, n=n), name, echoed)


def local_logprobs(loaded: LoadedModel, rows: Sequence[ServedRow]) -> list[FloatArray]:
    """Log-probability of every token from ``start`` on, one array per row, in nats."""
    found = []
    loaded.model.eval()
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.ids])
            batch = Batch((0,), ids, torch.ones_like(ids)).to(loaded.device)
            hidden = run_blocks(loaded.model, loaded.anatomy, batch)[0, row.start - 1:-1]
            target = batch.input_ids[0, row.start:]
            loss = torch.empty(len(target), dtype=torch.float32, device=loaded.device)
            for part, logits in chunks_of_logits(loaded.anatomy.unembed, hidden, loaded.anatomy.vocab_size):
                loss[part] = metrics.row_sums(logits, target[part]).loss
            found.append(-loss.double().cpu().numpy())
    return found


# ---------------------------------------------------------------- the server


def served_rows(server: _Server, name: str, rows: Iterable[Sequence[int]], loaded: LoadedModel,
                progress: Progress = silent) -> tuple[list[ServedRow], bool]:
    """Ask for every text; also whether its own tokens were scored."""
    rows = list(rows)
    found: list[ServedRow] = []
    echo = True
    for number, ids in enumerate(rows):
        row = server.echoed(name, ids) if echo else None
        if row is None and number == 0:
            echo = False  # this server scores what it writes only
        if row is None and not echo:
            row = server.written(name, ids, loaded.tokenizer)
        if row is not None:
            found.append(row)
        progress("ask the server", number + 1, len(rows))
    return found, echo


class _Server:
    """OpenAI's completions API, with the standard library alone."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"{shortened(url)} is not the address of a server; write http://localhost:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout

    def ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request; its answer as a JSON object."""
        where = f"{self.url}/v1/{path}"
        headers = {"Content-Type": "application/json", "User-Agent": "midblock"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(where, headers=headers, data=None if content is None
                                         else json.dumps(content).encode())
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read(_REPLY_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = ""
            with contextlib.suppress(OSError):
                said = shortened(error.read(400).decode("utf-8", "replace").strip(), 200)
            raise ServingError(f"{where} answered {error.code}: {said or error.reason}") from None
        except (OSError, ValueError) as error:
            raise ServingError(f"{where} cannot be reached: {getattr(error, 'reason', None) or error}. Is the server "
                               "running?") from None
        if len(text) > _REPLY_BYTES:
            raise ServingError(f"{where} answered with more than {_REPLY_BYTES >> 20} MiB.")
        found = parse_json(text.decode("utf-8", "replace"), where=where, error=ServingError)
        if not isinstance(found, dict):
            raise ServingError(f"{where} did not answer with a JSON object, as OpenAI's API does.")
        return found

    def model(self, wanted: str | None) -> str:
        """The name under which the adapter is served."""
        names = [str(m.get("id")) for m in self.ask("models").get("data") or [] if isinstance(m, dict)]
        if wanted is not None:
            if names and wanted not in names:
                raise SettingsError(f"{self.url} serves no model {wanted!r}; it serves {', '.join(names)}.")
            return wanted
        if len(names) != 1:
            raise SettingsError(f"{self.url} serves {', '.join(names) or 'no model'}; say which one should carry the "
                                f"adapter with {name_of('served_name')}.")
        return names[0]

    def _choice(self, content: dict[str, Any]) -> tuple[list[str], list[Any]]:
        """Tokens and log-probabilities of the answer's first choice; empty where it gives none."""
        answer = self.ask("completions", content)
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        given = first.get("logprobs")
        given = given if isinstance(given, dict) else {}
        tokens, values = given.get("tokens"), given.get("token_logprobs")
        if isinstance(given.get("content"), list):  # the form of the chat API, which llama.cpp uses here too
            tokens = [str(t.get("token")) for t in given["content"]]
            values = [t.get("logprob") for t in given["content"]]
        if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
            return [], []
        return [str(t) for t in tokens], values

    def echoed(self, name: str, ids: Sequence[int]) -> ServedRow | None:
        """Log-probabilities of the prompt's own tokens; None where the server does not give them."""
        try:
            _, values = self._choice({"model": name, "prompt": list(ids), "max_tokens": 1, "temperature": 0,
                                      "echo": True, "logprobs": 1})
        except ServingError as error:
            if " answered 4" in str(error):  # refused, as by servers without echo
                return None
            raise
        own = values[1:len(ids)]  # the first token has nothing before it, the last is written
        if len(values) < len(ids) or not all(_is_number(v) for v in own):
            return None
        return ServedRow(tuple(ids), 1, tuple(map(float, own)))

    def written(self, name: str, ids: Sequence[int], tokenizer: Any) -> ServedRow | None:
        """Log-probabilities of what the server writes after the first half; None where the tokens are not ours."""
        prompt = list(ids[:max(1, len(ids) // 2)])
        tokens, values = self._choice({"model": name, "prompt": prompt, "max_tokens": _NEW_TOKENS, "temperature": 0,
                                       "logprobs": 1, "return_tokens_as_token_ids": True})
        new = [_id_of(token, tokenizer) for token in tokens]
        # a token that is not known ends what can be compared, not what stands before it
        count = next((i for i, (n, v) in enumerate(zip(new, values, strict=True)) if n is None or not _is_number(v)),
                     len(new))
        if not count:
            return None
        return ServedRow((*prompt, *(n for n in new[:count] if n is not None)), len(prompt),
                         tuple(map(float, values[:count])))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _id_of(token: str, tokenizer: Any) -> int | None:
    """The id of a served token: told as ``token_id:5``, or the only one that the tokenizer makes of its text."""
    if token.startswith("token_id:"):
        number = token.removeprefix("token_id:")
        return int(number) if number.isdecimal() and int(number) < len(tokenizer) else None
    ids = tokenizer.encode(token, add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 and tokenizer.decode(ids) == token else None
