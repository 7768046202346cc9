"""Lens and swap on the real embedded model against the slow way: everything at once, weights really copied."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midblock.analysis.lens import lens
from midblock.analysis.swap import swap
from midblock.data import load_data, tokenize
from midblock.models import LoadedModel, find_anatomy, load_model
from midblock.segments import all_masks_single, segment_blocks

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"samples": 3, "max_length": 48, "batch_size": 2}


@pytest.fixture(scope="module", params=["everything", "blocks 12 to 17"])
def pair(request: pytest.FixtureRequest, smollm2_folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """SmolLM2 and a copy with seeded noise of 3% of each matrix' scale, everywhere or in the middle block only."""
    base = load_model(smollm2_folder, dtype="float32")
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (model if request.param == "everything" else model.model.layers[12:18]).parameters():
            if parameter.ndim > 1:
                parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return base, replace(base, model=model, anatomy=find_anatomy(model))


def samples(base: LoadedModel) -> list[torch.Tensor]:
    data = load_data("arithmetic").sample(SETTINGS["samples"], 0)
    return [torch.tensor([r.ids]) for r in tokenize(data, base.tokenizer, max_length=SETTINGS["max_length"]).rows]


def test_lens_equals_all_hidden_states_at_once(pair: tuple[LoadedModel, LoadedModel]) -> None:
    base, sft = pair
    frame = lens(base, sft, data="arithmetic", **SETTINGS).frame
    want: dict[tuple[int, str, str], float] = {}
    for ids in samples(base):
        logp = {}
        for side, model in (("base", base.model), ("sft", sft.model)):
            states: list[torch.Tensor] = []
            hooks = [b.register_forward_pre_hook(lambda m, args, kept=states: kept.append(args[0]))
                     for b in model.model.layers]
            hooks.append(model.model.norm.register_forward_pre_hook(lambda m, args, kept=states: kept.append(args[0])))
            with torch.inference_mode():
                model(input_ids=ids)
                for hook in hooks:
                    hook.remove()
                logits = model.lm_head(model.model.norm(torch.stack(states)))[:, 0, :-1]
            logp[side] = logits.double().log_softmax(-1)
            gold = logp[side].gather(-1, ids[0, 1:].expand(31, -1)[..., None])[..., 0]
            for metric, value in (("loss", -gold), ("entropy", -(logp[side].exp() * logp[side]).sum(-1)),
                                  ("gold_probability", gold.exp())):
                for h, mean in enumerate(value.mean(-1).tolist()):
                    want[h, metric, side] = want.get((h, metric, side), 0) + mean / SETTINGS["samples"]
        kl = (logp["base"].exp() * (logp["base"] - logp["sft"])).sum(-1).mean(-1)
        for h, mean in enumerate(kl.tolist()):
            want[h, "kl", "pair"] = want.get((h, "kl", "pair"), 0) + mean / SETTINGS["samples"]
    found = frame.set_index(["layer", "metric", "side"])["value"]
    assert len(want) == 31 * 7  # all samples are cut to one length, so that both kinds of mean are equal
    assert len({ids.shape[1] for ids in samples(base)}) == 1
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_swap_equals_copied_weights(pair: tuple[LoadedModel, LoadedModel]) -> None:
    base, sft = pair
    by_name = {"base": base, "sft": sft}
    frame = swap(base, sft, data="arithmetic", segments=5, **SETTINGS).frame
    found = frame[(frame["metric"] == "loss") & (frame["side"] != "difference")].set_index(
        ["recipient", "donor", "head", "layer"])["value"]
    for recipient, donor in (("base", "sft"), ("sft", "base")):
        for mask in all_masks_single(5):
            made = copy.deepcopy(by_name[recipient].model)
            for b in segment_blocks(mask, 30):
                made.model.layers[b].load_state_dict(by_name[donor].model.model.layers[b].state_dict())
            for head in ("base", "sft"):
                own = by_name[head].model
                with torch.inference_mode():
                    losses = []
                    for ids in samples(base):
                        kept: list[torch.Tensor] = []
                        hook = made.model.norm.register_forward_pre_hook(lambda m, args, k=kept: k.append(args[0]))
                        made.model(input_ids=ids)
                        hook.remove()
                        logits = own.lm_head(own.model.norm(kept[0]))[0, :-1]
                        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
                assert found[recipient, donor, head, mask] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
