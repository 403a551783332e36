"""The measures of a stage, on the tiny base and what step 3 makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.evaluation import evaluate
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import generation
from chatglm_ja.inference.models import Stage, find_stage, finished_stages
from chatglm_ja.sources import Source
from tests.conftest import DATA, PROJECT


@pytest.fixture(scope="module")
def config(base_dir: Path, resized_dir: Path) -> EvalConfig:
    unused = Path("unused")
    return EvalConfig(
        output_dir=unused,
        base_model=base_dir,
        tokenizer=unused,
        resized=resized_dir,
        pretrained=unused,
        sft=unused,
        sources=tuple(
            Source(name, str(DATA / f"heldout_{name}.jsonl.gz")) for name in ("ja", "zh")
        ),
        max_chars=400,
        window=64,
        prompts=PROJECT / "prompts" / "demo.yaml",
        conversations=(
            Source("ja", str(DATA / "heldout_sft.jsonl.gz"), where=("kind", "ja"), name="t"),
        ),
        choices=(Source("zh", str(DATA / "heldout_choice.jsonl.gz"), where=("language", "zh")),),
        max_new_tokens=5,
    )


def changed(config: EvalConfig, **changes: Any) -> EvalConfig:
    return EvalConfig(**{**vars(config), **changes})


@pytest.fixture(scope="module")
def stages(base_dir: Path, resized_dir: Path) -> list[Stage]:
    return [Stage("base", base_dir), Stage("resized", resized_dir)]


@pytest.fixture(scope="module")
def measured(
    config: EvalConfig, stages: list[Stage], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    prompts = tmp_path_factory.mktemp("prompts") / "p.yaml"
    prompts.write_text("ja: [あなたは誰ですか]\ncode: [Write a Basic example.]\n")
    config = changed(config, prompts=prompts)
    run = evaluate.Evaluation(config, evaluate.read_data(config))
    return [run.of_stage(stage, is_last=stage is stages[-1]) for stage in stages]


def test_the_resized_model_is_the_base_on_its_ids(measured: list[dict[str, Any]]) -> None:
    base, resized = measured
    assert base["kept"] == {}
    assert set(resized["kept"]) == {"ja", "zh"}
    for row in resized["kept"].values():
        assert row["largest_difference"] == 0
        assert 0 < row["divergence_bits"] < 0.5  # what the new pieces get
        assert row["tokens"] > 100


def test_another_model_is_not_the_base(
    config: EvalConfig, stages: list[Stage], resized_dir: Path, tmp_path: Path
) -> None:
    """One weight of the last layer norm differs: so do the logits, by a direct computation."""
    model = AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    other = tmp_path / "other"
    model.save_pretrained(other)
    encoder = tokenizer.load_processor(resized_dir)
    (other / "tokenizer.model").write_bytes((resized_dir / "tokenizer.model").read_bytes())
    material = evaluate.read_data(config)
    run = evaluate.Evaluation(config, material)
    run.of_stage(stages[0], is_last=False)
    row = run.of_stage(Stage("resized", other), is_last=False)["kept"]["zh"]
    base, _ = stages[0].load()
    rows = encoder.piece_to_id("<|observation|>") + 1
    old, new = [], []
    for text in material.texts["zh"][: evaluate.COMPARED_TEXTS]:
        # The base's ids, which the merged tokenizer gives Chinese too.
        ids = [*chat_format.prefix_ids(encoder), *encoder.encode(text)[: evaluate.COMPARED_TOKENS]]
        with torch.inference_mode():
            old.append(base(torch.tensor([ids])).logits[0, 1:])
            new.append(model(torch.tensor([ids])).logits[0, 1:])
    before, after = torch.cat(old), torch.cat(new)
    worst = (before[:, :rows] - after[:, :rows]).abs().max().item()
    assert row["largest_difference"] == pytest.approx(worst, rel=1e-4)
    assert row["tokens"] == len(before)
    p, q = before.softmax(-1)[:, :rows], after.softmax(-1)[:, :rows]
    bits = (p * (p / q).log2()).sum(-1).mean().item()
    assert row["divergence_bits"] == pytest.approx(bits, rel=1e-4)
    assert bits > 0.001


def test_speed_is_in_characters(measured: list[dict[str, Any]]) -> None:
    for stage in measured:
        speeds = [
            row["chars_per_second"] * row["tokens_per_char"] for row in stage["languages"].values()
        ]
        assert speeds[0] == pytest.approx(speeds[1])
        assert speeds[0] > 1


def test_questions_are_asked_of_all_and_held_out_ones_of_the_last(
    measured: list[dict[str, Any]], stages: list[Stage]
) -> None:
    base, resized = measured
    assert base["held_out"] == []
    assert [(row["kind"], row["way"], row["questions"]) for row in resized["held_out"]] == [
        ("ja", "greedy", 25),
        ("ja", "sampled", 25),
    ]
    for stage, results in zip(stages, measured, strict=True):
        questions = [row["question"] for row in results["answers"]]
        assert questions == ["あなたは誰ですか", "Write a Basic example."]
        assert results["answering"]["greedy"]["questions"] == 2
        model, encoder = stage.load()
        prompt = chat_format.build_prompt_ids(encoder, [{"role": "user", "content": questions[0]}])
        (given,) = generation.generate_answers(model, encoder, [prompt], 5)
        assert results["answers"][0]["greedy"]["text"] == given.text
        assert results["choices"]["zh"]["questions"] == 25
        assert results["harness"] == []


def test_a_model_smaller_than_its_tokenizer_is_one_line(
    resized_dir: Path, merged_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(resized_dir)
    model.resize_token_embeddings(4100)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((merged_dir / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match=r"4,100 embedding rows, but its tokenizer .* ids"):
        Stage("sft", tmp_path).load()


def test_a_window_beyond_the_model_is_one_line(config: EvalConfig, stages: list[Stage]) -> None:
    config = changed(config, window=300)
    run = evaluate.Evaluation(config, evaluate.read_data(config))
    with pytest.raises(ConfigError, match="--window 300 is more than the 256 positions of"):
        run.of_stage(stages[0], is_last=False)


@pytest.mark.parametrize("content", ["", json.dumps({"text": ""}) + "\n"])
def test_empty_held_out_text_is_one_line(config: EvalConfig, tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    sources = (*config.sources, Source("en", str(path)))
    with pytest.raises(DataError, match="--sources hold no en text: there is nothing to score"):
        evaluate.read_data(changed(config, sources=sources))


def test_the_latest_model_is_the_last_that_is_there(
    config: EvalConfig, base_dir: Path, tmp_path: Path
) -> None:
    config = changed(config, resized=tmp_path / "a", pretrained=tmp_path / "b")
    there = finished_stages(config.stages())
    assert there == [Stage("base", base_dir)]
    assert find_stage(there, "latest") == find_stage(there, "base") == there[0]
    with pytest.raises(ArtifactError, match="no model of the stage sft yet: expected one of base"):
        find_stage(there, "sft")
    with pytest.raises(ArtifactError, match="no model to talk to"):
        finished_stages(changed(config, base_model=tmp_path).stages())


def test_ways_to_talk_exclude_each_other(config: EvalConfig) -> None:
    with pytest.raises(ConfigError, match="--chat and --web are two ways to talk"):
        changed(config, chat=True, web=True)
