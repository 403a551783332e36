"""Command lines: defaults from the profile, everything wrong said at once and before loading."""

import runpy
from pathlib import Path
from typing import Any

import pytest

import constants
from chatglm_ja import settings_file
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.export.settings import ExportConfig
from chatglm_ja.settings import StepConfig, parse
from chatglm_ja.sources import Source
from chatglm_ja.storage.manifest import Manifest
from chatglm_ja.training.settings import SftConfig, TrainingConfig
from chatglm_ja.vocabulary.policies import Policy
from chatglm_ja.vocabulary.settings import (
    MergeTokenizerConfig,
    ResizeModelConfig,
    TrainTokenizerConfig,
)
from tests.conftest import PROJECT

DEFAULTS: dict[str, Any] = {"model": Path("m"), "data": Path("d"), "output_dir": Path("o")}


def parse_training(*argv: str) -> TrainingConfig:
    return parse(TrainingConfig, "", DEFAULTS, argv)


def test_flags_go_before_the_profile_and_the_profile_before_the_class() -> None:
    config = parse(TrainingConfig, "", {**DEFAULTS, "lora_rank": 4, "seed": 7}, ["--seed", "9"])
    assert (config.lora_rank, config.seed, config.logging_steps) == (4, 9, 10)
    assert not parse_training("--no-train-embeddings").train_embeddings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora-rnk", "4"], "unrecognized arguments: --lora-rnk 4 (did you mean --lora-rank?)"),
        (["--max_steps=4"], "did you mean --max-steps?"),
        (["--max_steps", "4"], "did you mean --max-steps?"),
        (["--max-step", "4"], "did you mean --max-steps?"),
        (["--Max-Steps=4"], "did you mean --max-steps?"),
        (["\u2014max-steps", "4"], "did you mean --max-steps?"),
        (["--epoch=2"], "did you mean --epochs?"),
        (["-lr", "1e-4"], "did you mean --lora-rank or --learning-rate?"),
        (["--lr=1e-4"], "did you mean --lora-rank or --learning-rate?"),
        (["--batch_size", "4"], "did you mean --micro-batch-size?"),
        (["--no_train_embedding"], "did you mean --no-train-embeddings?"),
        (["--zzz"], "unrecognized arguments: --zzz (--help lists the flags)"),
        (["--lora-rank", "many"], "argument --lora-rank: invalid int value: 'many'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--lora-rank", "0"], "--lora-rank is 0, expected 1 to inf"),
        (["--warmup-ratio", "2"], "--warmup-ratio is 2.0, expected 0 to 0.9"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--deepspeed", "none.json"], "--deepspeed none.json not found"),
        (["--max-steps", "0"], "leave nothing to train"),
        (["--learning-rate", "0", "--no-train-embeddings"], "leave nothing to train"),
        (["--tracker", "wandb"], "--tracker wandb needs its package"),
        (["--estimate", "0"], "--estimate is 0, expected 1"),
    ],
)
def test_bad_flags_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_training(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 3}}', "embeddings have been saved as empty tensors"),
        ('{"zero_optimization": {}}', "names no ZeRO stage: expected 2"),
        ("[]", "names no ZeRO stage: expected 2"),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_deepspeed_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_training("--deepspeed", str(path))


@pytest.mark.parametrize(
    ("program", "variable", "gpu"), [("g++", "CXX", False), ("gcc or clang", "CC", True)]
)
def test_compiling_needs_the_compiler_and_headers_that_torch_looks_for(
    program: str, variable: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [Path("/dev/nvidia0")] if gpu else []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(devices))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        parse_training("--compile")
    assert f"--compile needs {program}, which is not found: install it" in str(error.value)
    assert f"--compile needs Python.h, which is not in {tmp_path}: install" in str(error.value)
    for name in ("g++", "clang", "Python.h"):
        (tmp_path / name).touch(mode=0o755)
    parse_training("--compile")
    monkeypatch.setenv(variable, "/nowhere/compiler")
    with pytest.raises(ConfigError, match="--compile needs /nowhere/compiler, which is not found"):
        parse_training("--compile")
    parse_training("--compile", "--estimate", "4")
    parse_training()


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--lora-rank is 0.*; --seed is -1.*; --max-steps"):
        parse_training("--lora-rank", "0", "--seed", "-1", "--max-steps", "0")


def test_shares_must_name_the_sources() -> None:
    with pytest.raises(ConfigError, match="--shares names ja, zh, but the sources are ja"):
        PrepareDataConfig(
            output_dir=Path("o"), tokenizer=Path("t"), total_tokens=1, sft_examples=1,
            sources=(Source("ja", "x.txt"),), shares=("ja=1", "zh=1"),
            sft_sources=(Source("ja", "x.jsonl"),), sft_shares=("ja=1",),
        )  # fmt: skip


def test_a_path_that_nobody_set_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--sources is not set: texts of the new language"):
        parse(TrainTokenizerConfig, "", {"output_dir": Path("o")}, [])


def test_a_misspelled_profile_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"constants\.py sets lora_rnk"):
        parse(TrainingConfig, "", {**DEFAULTS, "lora_rnk": 1}, [])


def test_an_unknown_choice_is_refused() -> None:
    defaults = {"output_dir": Path("o"), "base_model": Path("b"), "tokenizer": Path("t")}
    with pytest.raises(ConfigError, match="invalid choice: 'none'"):
        parse(ResizeModelConfig, "", defaults, ["--init", "none"])
    with pytest.raises(ConfigError, match="--init is none, expected one of"):
        parse(ResizeModelConfig, "", {**defaults, "init": "none"}, [])


def test_an_export_has_a_dtype_only_as_gguf() -> None:
    defaults = {"output_dir": Path("o"), "model": Path("m")}
    with pytest.raises(ConfigError, match=r"argument --dtype: invalid choice: 'q4'.*'bf16'"):
        parse(ExportConfig, "", defaults, ["--dtype", "q4"])
    with pytest.raises(ConfigError, match="--dtype is for --to gguf only"):
        parse(ExportConfig, "", defaults, ["--to", "chatglm", "--dtype", "f16"])
    assert parse(ExportConfig, "", defaults, []).to == "gguf"


def test_continuing_the_base_needs_one_and_has_its_own_rules() -> None:
    defaults = {"output_dir": Path("o"), "sources": (Source("ja", "x.txt"),), "method": "continue"}
    with pytest.raises(ConfigError, match="--method continue needs --base-model"):
        parse(TrainTokenizerConfig, "", defaults, [])
    argv = ["--base-model", "b", "--no-split-digits"]
    with pytest.raises(ConfigError, match="--split-digits is for --method sentencepiece only"):
        parse(TrainTokenizerConfig, "", defaults, argv)


def test_sentencepiece_learns_for_a_base_with_a_sentencepiece_model_only(tmp_path: Path) -> None:
    defaults = {"output_dir": Path("o"), "sources": (Source("ja", "x.txt"),)}
    argv = ["--method", "sentencepiece", "--base-model"]
    parse(TrainTokenizerConfig, "", defaults, [*argv, "not-built-yet"])
    (tmp_path / "tokenizer.json").touch()
    message = f"for a base with a tokenizer.model, but {tmp_path} has none: pass --method continue"
    with pytest.raises(ConfigError, match=message):
        parse(TrainTokenizerConfig, "", defaults, [*argv, str(tmp_path)])
    (tmp_path / "tokenizer.model").touch()
    parse(TrainTokenizerConfig, "", defaults, [*argv, str(tmp_path)])


def test_what_shapes_nothing_is_refused_or_not_compared() -> None:
    defaults = {"output_dir": Path("o"), "sources": (Source("ja", "x.txt"),)}
    assert parse(TrainTokenizerConfig, "", defaults, ["--policy", "kana"]).policy is Policy.KANA
    argv = ["--base-model", "b", "--ja-tokenizer", "j", "--check-sources", "zh=x.txt"]
    argv += ["--ranking-sources", "ja=x.txt"]

    def arguments(*more: str) -> dict[str, Any]:
        return parse(
            MergeTokenizerConfig, "", {"output_dir": Path("o")}, [*argv, *more]
        ).arguments()

    assert arguments() == arguments("--ranking-characters", "5")
    limit = ["--max-new-pieces", "9"]
    assert arguments(*limit) != arguments(*limit, "--ranking-characters", "5")


@pytest.mark.parametrize(
    ("language", "policy", "message"),
    [
        ("jp", "japanese", "'jp' is no language code of ISO 639"),
        ("jp", "letters", "'jp' is no language code of ISO 639"),
        ("japanese", "japanese", "'japanese' is no language code of ISO 639"),
        ("ja_JP", "letters", "'ja_JP' is no language code of ISO 639"),
        ("JA", "japanese", r"'JA' is no language code .* \(did you mean ja\?\)"),
        ("jaa", "japanese", "policy japanese is for ja, but the language of a source is jaa: corr"),
        ("ko", "kana", "policy kana is for ja, .* is ko: .* pass --policy letters"),
        ("ja", "kana", None),
        ("ko", "letters", None),
        ("th", "letters", None),
        ("yue", "letters", None),
        ("zh", "han", None),
    ],
)
def test_the_language_of_step_1_is_a_code_that_the_policy_is_for(
    language: str, policy: str, message: str | None
) -> None:
    def parse_sources(*sources: Source) -> None:
        parse(
            TrainTokenizerConfig, "", {"output_dir": Path("o"), "sources": sources},
            ["--policy", policy],
        )  # fmt: skip

    if message is None:
        parse_sources(Source(language, "x.txt"))
        return
    with pytest.raises(ConfigError, match=message):
        parse_sources(Source(language, "x.txt"))


def test_step_2_takes_the_policy_of_step_1(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    argv = ["--base-model", "b", "--ja-tokenizer", "j", "--check-sources", "zh=x.txt"]
    manifest = Manifest(
        step="step1_train_tokenizer", arguments={"policy": "letters"}, counts={}, inputs={},
        lineage={}, fingerprint="0" * 64, files={},
    )  # fmt: skip
    default = parse(MergeTokenizerConfig, "", {"output_dir": Path("o")}, argv)
    assert default.choose_policy(manifest) is Policy.LETTERS
    assert default.choose_policy(None) is Policy.JAPANESE
    assert not caplog.messages
    chosen = parse(MergeTokenizerConfig, "", {"output_dir": Path("o")}, [*argv, "--policy", "kana"])
    assert chosen.choose_policy(manifest) is Policy.KANA
    assert caplog.messages == ["merging under the policy kana; step 1 learned under letters"]


def test_a_limit_of_pieces_needs_texts_to_rank_by() -> None:
    argv = ["--base-model", "b", "--ja-tokenizer", "j", "--check-sources", "zh=x.txt"]
    none = parse(
        MergeTokenizerConfig, "", {"output_dir": Path("o")}, [*argv, "--max-new-pieces", "0"]
    )
    assert none.max_new_pieces == 0
    with pytest.raises(ConfigError, match="--max-new-pieces needs --ranking-sources"):
        parse(MergeTokenizerConfig, "", {"output_dir": Path("o")}, [*argv, "--max-new-pieces", "9"])


def test_paths_and_progress_settings_do_not_shape_the_result() -> None:
    arguments = parse_training("--logging-steps", "3").arguments()
    assert "logging_steps" not in arguments
    assert "model" not in arguments
    assert "deepspeed" not in arguments
    assert arguments["lora_rank"] == 8


def test_lora_targets_are_the_same_in_any_order() -> None:
    named = parse_training("--lora-targets", "down_proj", "v_proj", "q_proj", "v_proj")
    assert named.lora_targets == ("down_proj", "q_proj", "v_proj")
    assert parse_training().lora_targets == ()  # all that the model has


@pytest.mark.parametrize("profile", ["demo", "chatglm3-6b"])
def test_the_profiles_fit_their_steps(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting exists and is within its limits, every source parses, shares name sources."""
    monkeypatch.setenv("CHATGLM_JA_PROFILE", profile)
    monkeypatch.setenv("CHATGLM3_6B_DIR", "/models/chatglm3")
    monkeypatch.setattr("chatglm_ja.training.settings._find_compiler_problems", lambda *_: [])
    constants = runpy.run_path(str(PROJECT / "constants.py"))
    steps: dict[str, type[StepConfig]] = {
        "STEP1": TrainTokenizerConfig, "STEP2": MergeTokenizerConfig, "STEP3": ResizeModelConfig,
        "STEP4": PrepareDataConfig, "STEP5": TrainingConfig, "STEP6": SftConfig,
        "STEP7": EvalConfig, "STEP8": ExportConfig,
    }  # fmt: skip
    for name, config in steps.items():
        parse(config, "", constants[name], []).arguments()
    data = parse(PrepareDataConfig, "", constants["STEP4"], [])
    assert parse_shares(data.shares) == {"ja": 0.76, "zh": 0.12, "en": 0.12}
    assert parse_shares(data.sft_shares) == {"ja": 0.52, "zh": 0.22, "en": 0.09, "code": 0.17}


def test_shares_add_up_to_one() -> None:
    assert parse_shares(["ja=76", "zh=12", "en=12"]) == {"ja": 0.76, "zh": 0.12, "en": 0.12}
    for bad in (["ja"], ["ja=x"], ["ja=-1", "zh=2"], ["ja=0"], ["ja=nan"], ["ja=1", "ja=2"]):
        with pytest.raises(ConfigError):
            parse_shares(bad)


STEP_CONFIGS = [
    ("STEP1", TrainTokenizerConfig), ("STEP2", MergeTokenizerConfig), ("STEP3", ResizeModelConfig),
    ("STEP4", PrepareDataConfig), ("STEP5", TrainingConfig), ("STEP6", SftConfig),
    ("STEP7", EvalConfig), ("STEP8", ExportConfig),
]  # fmt: skip


@pytest.mark.parametrize(("step", "kind"), STEP_CONFIGS)
def test_the_settings_file_of_a_run_repeats_it(
    tmp_path: Path, step: str, kind: type[StepConfig]
) -> None:
    config = parse(kind, "", getattr(constants, step), [])
    file = tmp_path / "settings.yaml"
    file.write_text(settings_file.dump(config, "step"), encoding="utf-8")
    assert parse(kind, "", {}, ["--config", str(file)]) == config


def test_flags_win_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "lora_rank: 4\nlearning_rate: 1e-5\npacking: false\nlora_targets: [q_proj, o_proj]\n"
        "gradient_checkpointing: full\ncontinue_from: null\n"
    )
    defaults = {"model": Path("m"), "data": Path("d"), "output_dir": Path("o"), "lora_rank": 2,
                "continue_from": Path("old"), "seed": 7}  # fmt: skip
    argv = ["--config", str(file), "--learning-rate", "3e-5", "--lora-targets", "q_proj"]
    config = parse(TrainingConfig, "", defaults, argv)
    assert (config.lora_rank, config.learning_rate, config.packing) == (4, 3e-5, False)
    assert (config.lora_targets, config.gradient_checkpointing) == (("q_proj",), "full")
    assert (config.continue_from, config.seed) == (None, 7)


def test_sources_in_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "sources:\n- ja=a.txt\n- {language: zh, path: b.jsonl, where: {kind: wiki}, weight: 2}\n"
        "sft_sources: null\nshares: [ja=1, zh=1]\ntotal_tokens: 9\nsft_examples: 0\n"
    )
    defaults = {"tokenizer": Path("t"), "output_dir": Path("o"), "sft_sources": (Source("x", "y"),)}
    config = parse(PrepareDataConfig, "", defaults, ["--config", str(file)])
    assert [source.path for source in config.sources] == ["a.txt", "b.jsonl"]
    assert config.sources[1].where == ("kind", "wiki")
    assert config.sft_sources == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "lora_rnak: 4",
            r"has lora_rnak, which is not a setting.*mean lora_rank\?",
        ),
        ("- 4", "expected settings, NAME: VALUE"),
        ("lora_rank: {a: 1}", "lora_rank is {'a': 1}, expected text or numbers"),
        ("lora_rank: 4.5", "--lora-rank: invalid int value: '4.5'"),
        ("precision: fp8", "--precision: invalid choice: 'fp8'"),
        ("lora_rank: 0", "--lora-rank is 0, expected 1"),
        ("lora_rank: [", "is not YAML"),
        ("lora_rank: true", "unrecognized|expected one argument"),
    ],
)
def test_a_bad_settings_file_gives_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse(TrainingConfig, "", DEFAULTS, ["--config", str(file)])
    with pytest.raises(ConfigError, match="could not be read"):
        parse(TrainingConfig, "", DEFAULTS, ["--config", str(tmp_path / "none.yaml")])
