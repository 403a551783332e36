"""The measures of the stages, on the tiny base and on the resized model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import load_processor
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
        parallel=(
            Source("ja", str(DATA / "heldout_parallel.jsonl.gz"), columns="Chinese>Japanese"),
        ),
        translations=2,
        max_new_tokens=5,
    )


def change_config(config: EvalConfig, **changes: Any) -> EvalConfig:
    return EvalConfig(**{**vars(config), **changes})


@pytest.fixture(scope="module")
def stages(base_dir: Path, resized_dir: Path) -> list[Stage]:
    return [Stage("base", base_dir), Stage("sft", resized_dir)]


@pytest.fixture(scope="module")
def measured(
    config: EvalConfig, stages: list[Stage], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    prompts = tmp_path_factory.mktemp("prompts") / "p.yaml"
    prompts.write_text("ja: [あなたは誰ですか]\ncode: [Write a Basic example.]\n")
    config = change_config(config, prompts=prompts)
    evaluation = evaluate.Evaluation(config)
    return [evaluation.evaluate_stage(stage) for stage in stages]


def test_the_resized_model_equals_the_base_on_its_ids(measured: list[dict[str, Any]]) -> None:
    base, resized = measured
    assert base["kept"] == {}
    assert set(resized["kept"]) == {"ja", "zh"}
    for row in resized["kept"].values():
        assert row["largest_difference"] == 0
        assert 0 < row["divergence_bits"] < 0.5  # what the new pieces get
        assert row["tokens"] > 100


def test_distance_of_another_model_from_the_base(
    config: EvalConfig, stages: list[Stage], resized_dir: Path, tmp_path: Path
) -> None:
    """Compare with a direct computation when one weight of the last layer norm differs."""
    model = AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    other = tmp_path / "other"
    model.save_pretrained(other)
    tokenizer = load_processor(resized_dir)
    (other / "tokenizer.model").write_bytes((resized_dir / "tokenizer.model").read_bytes())
    evaluation = evaluate.Evaluation(config)
    evaluation.evaluate_stage(stages[0])
    row = evaluation.evaluate_stage(Stage("resized", other))["kept"]["zh"]
    base = stages[0].load().model
    rows = tokenizer.piece_to_id("<|observation|>") + 1
    old, new = [], []
    for text in evaluation.texts["zh"][: evaluate.COMPARED_TEXTS]:
        # The base's ids, which the merged tokenizer gives Chinese too.
        prefix = chat_format.prefix_ids(tokenizer)
        ids = [*prefix, *tokenizer.encode(text)[: evaluate.COMPARED_TOKENS]]
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


def test_chars_per_second_follow_from_one_speed(measured: list[dict[str, Any]]) -> None:
    for stage in measured:
        speeds = [
            row["chars_per_second"] * row["tokens_per_char"] for row in stage["languages"].values()
        ]
        assert speeds[0] == pytest.approx(speeds[1])
        assert speeds[0] > 1


def test_only_the_last_stage_answers_all_held_out_questions_greedily(
    measured: list[dict[str, Any]], stages: list[Stage]
) -> None:
    base, resized = measured
    assert [(row["kind"], row["way"]) for row in base["held_out"]] == [("ja", "sampled")]
    assert [(row["kind"], row["way"], row["questions"]) for row in resized["held_out"]] == [
        ("ja", "greedy", 25),
        ("ja", "sampled", 25),
    ]
    for stage, results in zip(stages, measured, strict=True):
        examples, own = results["answers"][:10], results["answers"][10:]
        assert all(row["language"] == "ja" and row["expected"] for row in examples)
        questions = [row["question"] for row in own]
        assert questions == ["あなたは誰ですか", "Write a Basic example."]
        assert results["answering"]["greedy"]["questions"] == 2
        assert results["choices"]["zh"]["compared"]["acc"]["items"] == 50
        model = stage.load()
        prompt = model.tokenizer.build_prompt([{"role": "user", "content": questions[0]}])
        (answer,) = generation.generate_answers(model, [prompt], 5)
        assert own[0]["greedy"]["text"] == answer.text
        assert results["choices"]["zh"]["questions"] == 50
        assert results["harness"] == []


def test_stages_are_compared_with_the_base_on_the_same_items(
    measured: list[dict[str, Any]],
) -> None:
    base, resized = measured
    for stage in measured:
        assert list(stage["confusion"]) == ["ja"]  # no question is in Chinese
        assert stage["confusion"]["ja"]["other_han"]["items"] == 26
        assert stage["retention"] == {}  # nor in a language that the base knew
        assert [row["shots"] for row in stage["translations"]] == [0, 4]
    for key in ("probes", "translations"):
        for first, row in zip(base[key], resized[key], strict=True):
            assert first["change"] is None
            assert row["items"] == first["items"]
            assert row["change"] is not None


def test_the_languages_that_the_base_knew_are_asked(
    config: EvalConfig, stages: list[Stage], tmp_path: Path
) -> None:
    prompts = tmp_path / "p.yaml"
    prompts.write_text("ja: [あなたは誰ですか]\nzh: [你是谁, 什么是单元格]\n")
    config = change_config(
        config, prompts=prompts, conversations=(), choices=(), parallel=(), max_chars=40
    )
    evaluation = evaluate.Evaluation(config)
    base, resized = (evaluation.evaluate_stage(stage) for stage in stages)
    assert list(base["retention"]) == list(resized["retention"]) == ["zh"]
    assert base["retention"]["zh"]["characters"]["items"] == 2
    assert resized["retention"]["zh"]["characters"]["change"] is not None
    assert resized["probes"] == []  # 40 characters hold too few words
    assert resized["translations"] == []


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
    config = change_config(config, window=300)
    evaluation = evaluate.Evaluation(config)
    with pytest.raises(ConfigError, match="--window 300 is more than the 256 positions of"):
        evaluation.evaluate_stage(stages[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "source en/empty .* holds no record"),
        (json.dumps({"text": ""}) + "\n", "--sources hold no en text: there is nothing to score"),
    ],
)
def test_empty_held_out_text_is_one_line(
    config: EvalConfig, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    sources = (*config.sources, Source("en", str(path)))
    with pytest.raises(DataError, match=message):
        evaluate.Evaluation(change_config(config, sources=sources))


def test_the_latest_stage_is_the_last_that_exists(
    config: EvalConfig, base_dir: Path, tmp_path: Path
) -> None:
    config = change_config(config, resized=tmp_path / "a", pretrained=tmp_path / "b")
    finished = finished_stages(config.stages())
    assert finished == [Stage("base", base_dir)]
    assert find_stage(finished, "latest") == find_stage(finished, "base") == finished[0]
    with pytest.raises(ArtifactError, match="no model of the stage sft yet: expected one of base"):
        find_stage(finished, "sft")
    with pytest.raises(ArtifactError, match="no model found"):
        finished_stages(change_config(config, base_model=tmp_path).stages())


def test_chat_and_web_exclude_each_other(config: EvalConfig) -> None:
    with pytest.raises(ConfigError, match="--chat and --web exclude each other"):
        change_config(config, chat=True, web=True)
