"""The registry of known pairs and its warnings."""

from __future__ import annotations

import pytest

from midblock.models.pairs import known_pairs, pair_warning, stages_of


def test_only_the_papers_two_families_are_suitable() -> None:
    suitable = [p for p in known_pairs() if p.suitable]
    assert {p.family for p in suitable} == {"OLMo-2", "Mistral"}
    assert {p.tuned for p in suitable} == {
        "allenai/OLMo-2-0425-1B-SFT", "allenai/OLMo-2-1124-7B-SFT", "allenai/OLMo-2-1124-13B-SFT",
        "allenai/OLMo-2-0325-32B-SFT", "mistralai/Mistral-7B-Instruct-v0.1"}
    assert all((p.warning is None) is p.suitable for p in known_pairs())
    assert known_pairs()[: len(suitable)] == suitable


@pytest.mark.parametrize("family", ["LLaMA", "Gemma", "Qwen", "DeepSeek", "Falcon", "Pythia", "OPT"])
def test_other_families_of_the_papers_table_are_there_with_a_warning(family: str) -> None:
    found = known_pairs(family)
    assert found
    assert not any(p.suitable for p in found)


def test_no_pair_twice() -> None:
    keys = [(p.base, p.tuned) for p in known_pairs()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("base", "sft", "says"), [
    ("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-SFT", None),
    ("some/unknown", "some/unknown-sft", None),
    ("google/gemma-2-2b", "google/gemma-2-2b-it", "SFT + RLHF"),
    ("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-Instruct", "use allenai/OLMo-2-1124-7B-SFT"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2", "was tuned from"),
    ("allenai/OLMo-2-1124-7B-SFT", "allenai/OLMo-2-1124-7B-DPO", "was tuned from"),
    ("meta-llama/Llama-2-7b-chat-hf", "mine/tuned-again", "is itself tuned"),
    ("models/OLMo-2-0425-1B/", "./models/olmo-2-0425-1b-dpo", "SFT + DPO"),
])
def test_pair_warning(base: str, sft: str, says: str | None) -> None:
    warning = pair_warning(base, sft)
    assert (warning is None) if says is None else (warning is not None and says in warning)


def test_hub_cache_snapshots_are_recognised() -> None:
    def snapshot(owner: str, name: str) -> str:
        return f"hub/models--{owner}--{name}/snapshots/{'0a' * 20}"

    assert pair_warning(snapshot("google", "gemma-2b"), snapshot("google", "gemma-2b-it")) is not None


def test_stages() -> None:
    assert stages_of("allenai/OLMo-2-1124-13B")[-1] == "allenai/OLMo-2-1124-13B-Instruct"
    assert stages_of("nobody/knows") == []
