"""SupervisedHead changes no loss and no gradient, under plain loops, transformers' and TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from families import FAMILIES, PAD, token_ids
from midblock.errors import SettingsError
from midblock.models import find_anatomy
from midblock.tuning import FrozenPrefix, SupervisedHead, lora_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adapted(family: str) -> Any:
    model = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = get_peft_model(model, lora_config(model, mask="0110", rank=4))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


def batch(lengths: tuple[int, ...] = (9, 12, 5)) -> dict[str, Tensor]:
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = token_ids(1, n, seed=i)[0], 1
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, **more: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch(), **more).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma3", "gemma3_nested", "qwen3_moe", "opt"])
def test_loss_and_gradients_are_the_models_own(family: str) -> None:
    model = adapted(family)
    more = {"token_type_ids": torch.zeros_like(batch()["input_ids"])} if family == "gemma3_nested" else {}
    for count in (None, 37):
        own = dict(more) if count is None else {**more, "num_items_in_batch": count}
        want, gradients = step(model, **own)
        shapes: list[int] = []
        anatomy = find_anatomy(model)
        with SupervisedHead(model) as head:
            assert head.notes == []
            handle = anatomy.head.register_forward_hook(lambda m, a, o, s=shapes: s.append(o.shape[-1]))
            got, mine = step(model, **own)
            handle.remove()
        assert got == pytest.approx(want, rel=1e-6)
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (mine[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
        # the head hands on its input, and is not called where the padding stayed out: no logits in either
        windows = family.startswith("gemma3")  # shorter than a row: its mask is needed
        assert shapes == ([] if head.packs and not windows else [32])
        assert (head.labelled, head.tokens) == (26 - 9, 3 * 11)
    with torch.no_grad():
        assert model(**batch(), **more).logits.shape[-1] == 128  # all restored


def test_padding_stays_out_of_the_blocks_where_nothing_can_differ() -> None:
    model = adapted("llama")
    block = find_anatomy(model).blocks[1]
    seen: list[tuple[int, ...]] = []
    block.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[:2])))
    inputs = batch()
    masked = inputs["labels"].clone()
    masked[2, 5:7] = 5  # labels on padding: its hidden states are wanted
    cases = {"packed": (inputs, (1, 26)), "left": ({k: v.flip(1) for k, v in inputs.items()}, (3, 12)),
             "full rows": (batch((7, 7)), (2, 7)), "labelled padding": ({**inputs, "labels": masked}, (3, 12)),
             "positions": ({**inputs, "position_ids": torch.arange(12).expand(3, 12)}, (3, 12))}
    for name, (call, shape) in cases.items():
        want = model(**call).loss
        with SupervisedHead(model):
            seen.clear()
            got = model(**call).loss
        assert seen == [shape], name
        assert got.item() == pytest.approx(want.item(), rel=1e-6), name
    with SupervisedHead(model):
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5


def test_forwards_without_gradient_or_labels_have_logits() -> None:
    model = adapted("llama")
    inputs = batch()
    with SupervisedHead(model):
        with torch.no_grad():
            assert model(**inputs).logits.shape == (3, 12, 128)
        assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 12, 128)
        out = model(**inputs)
        assert out.logits is None
        assert torch.equal(out[0], out.loss)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "t5"])
def test_heads_that_are_more_than_a_product_are_left_alone(family: str) -> None:
    model = adapted(family)
    want = step(model)
    with SupervisedHead(model) as head:
        got = step(model)
    assert "left as it is" in head.notes[0]
    assert got[0] == want[0]


def test_autocast_computes_what_it_computes() -> None:
    model = adapted("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, gradients = step(model)
        with SupervisedHead(model):
            got, mine = step(model)
    assert got == pytest.approx(want, rel=1e-2)
    both = [torch.cat([g.flatten() for g in gs.values()]) for gs in (mine, gradients)]
    assert (both[0] - both[1]).norm() <= 0.05 * both[1].norm()


def test_two_on_one_model_are_refused_and_errors_restore_it() -> None:
    model = adapted("llama")
    with SupervisedHead(model), pytest.raises(SettingsError, match="another SupervisedHead"), SupervisedHead(model):
        pass
    with pytest.raises(ZeroDivisionError), SupervisedHead(model):
        raise ZeroDivisionError
    assert all("forward" not in m.__dict__ for m in model.modules())


def rows() -> list[dict[str, list[int]]]:
    made = []
    for i, n in enumerate((9, 12, 7, 10)):
        ids = token_ids(1, n, seed=i)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return made


@pytest.mark.parametrize("contexts", ["head", "both"])
def test_trl_sft_trainer(contexts: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def run(name: str) -> list[dict[str, float]]:
        model = FAMILIES["llama"]()
        trainer = SFTTrainer(
            model, train_dataset=Dataset.from_list(rows()), processing_class=tiny_tokenizer,
            eval_dataset=Dataset.from_list(rows()), peft_config=lora_config(model, mask="0010", rank=4),
            args=SFTConfig(output_dir=str(tmp_path / name), max_steps=6, per_device_train_batch_size=2,
                           logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="no",
                           report_to="none", bf16=False, use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
                           dataloader_pin_memory=False))
        if name == "plain":
            trainer.train()
        elif name == "head":
            with SupervisedHead(trainer.model) as head:
                trainer.train()
            assert head.labelled < head.tokens
        else:
            with FrozenPrefix(trainer.model, cache="memory") as prefix, SupervisedHead(trainer.model) as head:
                trainer.train()
            assert head.packs
            assert prefix.rows_computed == 4  # evaluation reads what training has kept
            assert prefix.rows_cached == 8 + 8
        return trainer.state.log_history

    want, got = run("plain"), run(contexts)
    for key in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "grad_norm"):
        theirs = [e[key] for e in want if key in e]
        assert theirs
        assert [e[key] for e in got if key in e] == pytest.approx(theirs, rel=1e-5), key


def test_transformers_trainer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def run(inside: bool) -> list[float]:
        trainer = Trainer(
            adapted("qwen2"), train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer),
            args=TrainingArguments(output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2,
                                   gradient_accumulation_steps=2, logging_steps=1, save_strategy="no",
                                   report_to="none", use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
                                   dataloader_pin_memory=False))
        if inside:
            with SupervisedHead(trainer.model):
                trainer.train()
        else:
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert run(True) == pytest.approx(run(False), rel=1e-6)
