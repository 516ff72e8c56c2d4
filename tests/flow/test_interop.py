"""Configurations of other trainers: what becomes of each key, with the numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmops.core.spec import DataFormat, Spec
from slmops.errors import SlmopsError, UsageError
from slmops.flow.interop import TRAINERS, Imported, axolotl_data, detect, olive_form, read
from slmops.flow.interop.render import ORDER
from slmops.flow.interop.rules import Ignored, To
from slmops.flow.project import load
from tests.cli.conftest import Slmops, slmops  # noqa: F401

PREFERENCE = "preference" if "preference" in get_args(DataFormat) else "auto"

FACTORY = """\
model_name_or_path: acme/small-1b
stage: sft
do_train: true
finetuning_type: lora
dataset: faq
dataset_dir: sets
template: acme
cutoff_len: 512
output_dir: out/faq
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""

AXOLOTL = """\
base_model: acme/small-1b
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
sequence_len: 512
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 3
learning_rate: 0.0002
"""

OLIVE = """\
model_name_or_path: acme/small-1b
data_name: acme/letters
text_template: "Q: {question} A: {reply}"
method: lora
lora_r: 16
lora_alpha: 32
max_steps: 200
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, where the user stands."""
    monkeypatch.chdir(tmp_path)
    sets = tmp_path / "sets"
    sets.mkdir()
    pairs = [{"instruction": f"question {i}", "input": "", "output": "yes"} for i in range(80)]
    (sets / "faq.json").write_text(json.dumps(pairs))
    talks = [
        {"conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "gpt", "value": "ho"}]} for i in range(20)
    ]
    (sets / "talk.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks) + "\n")
    info = {
        "faq": {"file_name": "faq.json"},
        "talk": {"file_name": "talk.jsonl", "formatting": "sharegpt"},
        "renamed": {"file_name": "faq.json", "columns": {"prompt": "instruction", "response": "reply"}},
        "chats": {
            "file_name": "talk.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "tools": {"file_name": "talk.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
        "pairs": {"file_name": "faq.json", "ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "worse"}},
        "far": {"hf_hub_url": "acme/faq", "subset": "en", "split": "train"},
        "elsewhere": {"ms_hub_url": "acme/faq"},
    }  # fmt: skip
    (sets / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    return tmp_path


def imported(text: str, name: str = "file.yaml", trainer: str = "auto") -> Imported:
    Path(name).write_text(text)
    return read(Path(name), trainer, Path("slmops.yaml"))


def spec(found: Imported) -> Spec:
    """The text as slmops itself reads it."""
    Path("slmops.yaml").write_text(found.text)
    return load(Path("slmops.yaml")).spec


def change(text: str, **keys: Any) -> str:
    """The text with these keys at its end, or in place of those it has."""
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in keys]
    return "\n".join([*kept, *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]) + "\n"


def kinds(found: Imported, kind: str) -> dict[str, str]:
    return {finding.key: finding.note for finding in found.findings if finding.kind == kind and finding.key}


# --------------------------------------------------------------------------------------------------- the tables


def resolves(path: str) -> bool:
    model: Any = Spec
    for part in path.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return False
        annotation = fields[part].annotation
        model = next((m for m in (annotation, *get_args(annotation)) if hasattr(m, "model_fields")), None)
    return True


TABLES = {name: (module.TRANSLATED, module.IGNORED) for name, module in TRAINERS.items()}
TABLES["axolotl datasets"] = (axolotl_data.TRANSLATED, axolotl_data.IGNORED)


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_translated_or_ignored_and_never_both(name: str) -> None:
    translated, ignored = TABLES[name]
    assert not translated.keys() & ignored.keys()
    assert all(isinstance(rule, To) for rule in translated.values())
    assert all(isinstance(rule, Ignored) and len(rule.reason) > 8 for rule in ignored.values())
    for key, rule in translated.items():
        plain = rule.path.startswith(("always", "none")) or rule.path == "teacher"
        assert plain or rule.path in ORDER or resolves(rule.path), key


def test_every_place_that_can_be_written_is_a_key_of_slmops() -> None:
    assert [path for path in ORDER if not resolves(path)] == []


@pytest.mark.slow
def test_all_training_arguments_of_transformers_are_known() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra train")
    names = {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments) if field.init}
    for trainer in ("llamafactory", "olive"):
        assert names - set(TRAINERS[trainer].TABLE) == set()


# ------------------------------------------------------------------------------------------------- LLaMA-Factory


def test_factory_lora() -> None:
    found = imported(FACTORY)
    assert found.trainer == "llamafactory"
    got = spec(found)
    train = got.train
    assert (train.method, train.tuning, train.lora.rank, train.lora.strength) == ("sequence", "lora", 8, 16.0)
    assert (train.batch_size, train.accumulate) == (16, 8)  # 2 × 8
    assert (train.learning_rate, train.epochs, train.warmup, train.final_learning_rate) == (1e-4, 2.0, 0.1, 0.0)
    assert (train.weight_decay, train.clip, train.patience, train.max_length) == (0.0, 1.0, 0, 512)
    assert (train.precision, train.lora.targets) == ("bf16", None)
    assert (got.student.base, got.data.path, got.data.format) == ("hf:acme/small-1b", "sets/faq.json", "alpaca")
    assert "2 per device × 8" in kinds(found, "changed")["per_device_train_batch_size"]
    assert found.lost == ()


def test_factory_full() -> None:
    got = spec(
        imported(change(FACTORY, finetuning_type="full", lora_rank=4, max_grad_norm=0, label_smoothing_factor=0.1))
    )
    assert (got.train.tuning, got.train.lora.rank) == ("full", Spec.model_fields["train"].default.lora.rank)
    assert (got.train.clip, got.train.label_smoothing) == (1e9, 0.1)


@pytest.mark.parametrize(
    ("keys", "tuning", "alpha"),
    [
        ({"quantization_bit": 4, "lora_rank": 16, "lora_alpha": 8}, "qlora", 8.0),
        ({"use_dora": True, "lora_rank": 4}, "dora", 8.0),
        ({"use_rslora": True, "lora_rank": 4, "lora_alpha": 6}, "rslora", 6.0),
        ({"use_rslora": True, "use_dora": True, "lora_rank": 16, "lora_alpha": 8}, "dora", 32.0),  # 8 × √16
        ({"use_rslora": True, "quantization_bit": 4, "lora_rank": 64}, "qlora", 1024.0),  # 2 × 64 × √64
    ],
)
def test_factory_tunings(keys: dict[str, Any], tuning: str, alpha: float) -> None:
    got = spec(imported(change(FACTORY, **keys)))
    assert (got.train.tuning, got.train.lora.rank, got.train.lora.strength) == (tuning, keys["lora_rank"], alpha)


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ({"finetuning_type": "freeze"}, "finetuning_type"),
        ({"finetuning_type": "oft"}, "finetuning_type"),
        ({"quantization_bit": 8}, "quantization_bit"),
        ({"quantization_bit": 4, "use_dora": True}, "use_dora"),
        ({"deepspeed": "zero3.json"}, "deepspeed"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"optim": "lion_32bit"}, "optim"),
        ({"adam_beta2": 0.999}, "adam_beta2"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ({"lora_target": "model.*proj"}, "lora_target"),
        ({"additional_target": "embed_tokens,input_layernorm"}, "additional_target"),
        ({"mystery_knob": 1}, "mystery_knob"),
        ({"stage": "dpo", "pref_loss": "simpo"}, "pref_loss"),
    ],
)
def test_factory_what_is_lost_is_named_and_strict_refuses_it(keys: dict[str, Any], lost: str, slmops: Slmops) -> None:  # noqa: F811
    found = imported(change(FACTORY, **keys))
    spec(found)
    assert [finding.key for finding in found.lost] == [lost]
    assert f"#   {lost}: " in found.text
    Path("slmops.yaml").unlink()
    refused = slmops("import", "file.yaml", "--strict")
    refused.refused(2, f"{lost}: ")
    assert not Path("slmops.yaml").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"neftune_noise_alpha": None}, {"deepspeed": None}, {"optim": "adamw_torch"}, {"optim": "adamw_8bit"},
        {"use_galore": False}, {"resize_vocab": False}, {"quantization_method": "bnb"}, {"moe_aux_loss_coef": 0.0},
        {"lora_target": "all"}, {"report_to": "wandb"}, {"trust_remote_code": True}, {"adam_beta2": 0.98},
    ],
)  # fmt: skip
def test_factory_keys_that_change_nothing_pass_strict(keys: dict[str, Any]) -> None:
    found = imported(change(FACTORY, **keys))
    assert found.lost == ()
    assert next(iter(keys)) in kinds(found, "ignored") | kinds(found, "translated")


def test_factory_targets_and_prompt_and_checkpointing() -> None:
    keys = {"lora_target": "q_proj, v_proj", "train_on_prompt": True, "disable_gradient_checkpointing": False}
    got = spec(
        imported(change(FACTORY, **keys, neat_packing=True, seed=7, default_system='Be brief: "yes" or no.'))
    ).model_copy()
    assert (got.train.lora.targets, got.train.prompt_weight) == (("q_proj", "v_proj"), 1.0)
    assert (got.train.checkpointing, got.train.batching, got.seed) == (True, "pack", 7)
    assert got.task.instruction == 'Be brief: "yes" or no.'


def test_factory_steps_become_shares_by_the_rows() -> None:
    """80 rows, a tenth held back: 72 in batches of 16 are 5 steps an epoch, 10 in two epochs."""
    found = imported(
        change(FACTORY, warmup_ratio=0.0, warmup_steps=2, val_size=0.1, eval_strategy="steps", eval_steps=5)
    )
    got = spec(found)
    assert (got.train.warmup, got.train.evaluations, got.data.splits.validation) == (0.2, 2, 0.1)
    assert "2 of 10 steps" in kinds(found, "changed")["warmup_steps"]
    got = spec(imported(change(FACTORY, warmup_steps=30, max_steps=120, max_samples=50, val_size=20)))
    assert (got.train.warmup, got.train.max_steps, got.data.max_examples) == (0.25, 120, 50)
    assert got.data.splits.validation == 0.4  # 20 of the 50 that are taken
    lost = imported(change(FACTORY, warmup_steps=30, dataset="far")).lost
    assert [finding.key for finding in lost] == ["warmup_steps"]
    assert "30 / steps" in lost[0].note


@pytest.mark.parametrize(
    ("name", "more", "end", "warmup"),
    [
        ("cosine", {}, 0.0, 0.1),
        ("linear", {}, 0.0, 0.1),
        ("constant", {}, 1.0, 0.0),
        ("constant_with_warmup", {}, 1.0, 0.1),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.25}}, 0.25, 0.1),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 2e-5}}, 0.2, 0.1),
    ],
)
def test_factory_schedules(name: str, more: dict[str, Any], end: float, warmup: float) -> None:
    train = spec(imported(change(FACTORY, lr_scheduler_type=name, **more))).train
    assert (train.final_learning_rate, train.warmup) == (end, warmup)


def test_factory_defaults_are_those_of_the_trainer_not_of_slmops() -> None:
    found = imported("model_name_or_path: acme/small-1b\ndataset: faq\ndataset_dir: sets\ntemplate: acme\n")
    train = spec(found).train
    assert (train.tuning, train.lora.rank, train.epochs, train.batch_size) == ("lora", 8, 3.0, 8)
    assert (train.learning_rate, train.warmup, train.weight_decay, train.max_length) == (5e-5, 0.0, 0.0, 2048)
    assumed = {path for finding in found.findings if finding.kind == "assumed" for path in finding.to}
    assert {"train.learning_rate", "train.tuning", "data.splits.validation", "data.splits.test", "task.type"} <= assumed


def test_factory_dpo() -> None:
    found = imported(
        change(FACTORY, stage="dpo", dataset="pairs", pref_beta=0.2, dpo_label_smoothing=0.1, pref_loss="sigmoid")
    )
    got = spec(found)
    assert (got.train.method, got.train.tuning, got.data.format) == ("dpo", "lora", PREFERENCE)
    assert (got.train.preference.beta, got.train.preference.label_smoothing) == (0.2, 0.1)
    assert "rename worse to rejected" in found.lost[0].note
    assert spec(imported(change(FACTORY, stage="dpo", dataset="pairs", pref_loss="orpo"))).train.method == "orpo"


def test_factory_datasets_of_one_folder_and_others() -> None:
    got = spec(imported(change(FACTORY, dataset="faq,talk")))
    assert (got.data.path, got.data.splits.train, got.data.format) == ("sets", ("faq.json", "talk.jsonl"), "auto")
    got = spec(imported(change(FACTORY, dataset="faq", eval_dataset="talk")))
    assert (got.data.path, got.data.splits.validation) == ("sets/faq.json", ("talk.jsonl",))
    found = imported(change(FACTORY, dataset=["talk", "far"]))
    got = spec(found)
    assert (got.data.path, got.data.format, got.task.type) == ("sets/talk.jsonl", "sharegpt", "chat")
    assert "far" in found.lost[0].note
    assert "last answer" in kinds(found, "changed")["dataset"]
    got = spec(imported(change(FACTORY, dataset="far")))
    assert (got.data.path, got.data.splits.train) == ("hf:acme/faq:en", None)


@pytest.mark.parametrize(
    ("name", "form", "columns", "lost"),
    [
        ("renamed", "auto", {"prompt": "instruction", "answer": "reply"}, 0),
        ("chats", "messages", {}, 0),
        ("tools", "sharegpt", {}, 1),
        ("elsewhere", "alpaca", {}, 1),
        ("nowhere", "auto", {}, 1),
    ],
)
def test_factory_dataset_info(name: str, form: str, columns: dict[str, str], lost: int) -> None:
    found = imported(change(FACTORY, dataset=name))
    data = spec(found).data
    assert data.format == form
    assert {key: value for key, value in data.columns.model_dump().items() if value} == columns
    assert len(found.lost) == lost
    if name == "nowhere":
        assert data.path == "nowhere"
        assert "sets/dataset_info.json" in found.lost[0].note


def test_factory_without_dataset_info_says_which_file_it_wants() -> None:
    found = imported(change(FACTORY, dataset_dir="gone"))
    assert spec(found).data.path == "faq"
    assert "gone/dataset_info.json" in found.lost[0].note
    (Path("sets") / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match=r"dataset_info\.json cannot be read"):
        imported(FACTORY)


# ------------------------------------------------------------------------------------------------------- Axolotl


def test_axolotl_full() -> None:
    found = imported(AXOLOTL)
    assert found.trainer == "axolotl"
    got = spec(found)
    train = got.train
    assert (train.method, train.tuning, train.batch_size, train.accumulate) == ("sequence", "full", 8, 2)
    assert (train.epochs, train.learning_rate, train.max_length) == (3.0, 2e-4, 512)
    assert (train.warmup, train.final_learning_rate, train.weight_decay) == (0.03, 0.0, 0.0)
    assert (got.data.path, got.data.format, got.data.splits.validation) == ("rows.jsonl", "alpaca", 0.05)
    assert found.lost == ()
    steps = [step.id for step in load(Path("slmops.yaml")).plan()]
    assert steps[0] == "data" and {"student-base", "student", "student-int4", "bundle"} <= set(steps)


@pytest.mark.parametrize(
    ("keys", "tuning", "alpha"),
    [
        ({"adapter": "lora"}, "lora", 16.0),
        ({"adapter": "qlora", "load_in_4bit": True}, "qlora", 16.0),
        ({"adapter": "lora", "load_in_4bit": True}, "qlora", 16.0),
        ({"adapter": "lora", "peft_use_dora": True}, "dora", 16.0),
        ({"adapter": "lora", "peft_use_rslora": True}, "rslora", 16.0),
        ({"adapter": "qlora", "peft_use_rslora": True}, "qlora", 96.0),  # 16 × √36
    ],
)
def test_axolotl_tunings(keys: dict[str, Any], tuning: str, alpha: float) -> None:
    more = {"lora_r": 36, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True}
    found = imported(change(AXOLOTL, **keys, **more))
    lora = spec(found).train.lora
    assert spec(found).train.tuning == tuning
    assert (lora.rank, lora.strength, lora.dropout, lora.targets) == (36, alpha, 0.05, None)
    assert found.lost == ()
    got = spec(imported(change(AXOLOTL, **keys, lora_r=8, lora_target_modules=["q_proj", "k_proj"])))
    assert got.train.lora.targets == ("q_proj", "k_proj")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("FACTORY", {"additional_target": "embed_tokens, lm_head"}),
        ("AXOLOTL", {"adapter": "lora", "lora_modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_embeddings_beside_low_rank_weights(text: str, keys: dict[str, Any]) -> None:
    found = imported(change(globals()[text], **keys))
    assert found.lost == ()
    assert spec(found).train.lora.embeddings
    assert not spec(imported(globals()[text])).train.lora.embeddings


def test_axolotl_says_that_peft_would_choose_the_layers() -> None:
    found = imported(change(AXOLOTL, adapter="lora", lora_r=8))
    assert "train.lora.targets: all linear layers" in found.text
    assert "train.lora.targets" not in imported(AXOLOTL).text


def test_axolotl_batches_steps_and_looks() -> None:
    """80 rows less 5 %: 76 in batches of 8 are 10 steps an epoch, 30 in three."""
    found = imported(change(AXOLOTL, warmup_steps=6, evals_per_epoch=4))
    got = spec(found)
    assert (got.train.warmup, got.train.evaluations) == (0.2, 12)
    assert spec(imported(change(AXOLOTL, eval_steps=10, max_steps=100))).train.evaluations == 10
    assert spec(imported(change(AXOLOTL, eval_steps=0.25))).train.evaluations == 4
    text = change(AXOLOTL, batch_size=32).replace("gradient_accumulation_steps: 2\n", "")
    assert (spec(imported(text)).train.batch_size, spec(imported(text)).train.accumulate) == (32, 8)
    assert spec(imported(change(AXOLOTL, max_steps=10_000))).train.warmup == 0.01  # 3 %, but 100 steps at most
    packed = imported(change(AXOLOTL, sample_packing=True, warmup_steps=6))
    assert spec(packed).train.batching == "pack"
    assert [finding.key for finding in packed.lost] == ["warmup_steps"]  # rows no longer tell the steps
    held = spec(imported(change(AXOLOTL, val_set_size=8))).data.splits.validation
    assert held == 0.1  # 8 of 80


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({"bf16": "auto"}, "auto"), ({"bf16": True}, "bf16"), ({"bf16": False, "fp16": True}, "auto"),
        ({"bf16": False}, "fp32"), ({"float32": True}, "fp32"), ({"bfloat16": True}, "bf16"),
    ],
)  # fmt: skip
def test_axolotl_precision(keys: dict[str, Any], precision: str) -> None:
    assert spec(imported(change(AXOLOTL, **keys))).train.precision == precision


def test_axolotl_preferences() -> None:
    found = imported(change(AXOLOTL, rl="dpo", rl_beta=0.3, dpo_label_smoothing=0.05))
    got = spec(found)
    assert (got.train.method, got.data.format) == ("dpo", PREFERENCE)
    assert (got.train.preference.beta, got.train.preference.label_smoothing) == (0.3, 0.05)
    got = spec(imported(change(AXOLOTL, rl="orpo", orpo_alpha=0.2)))
    assert (got.train.method, got.train.preference.beta) == ("orpo", 0.2)
    assert [finding.key for finding in imported(change(AXOLOTL, rl="ipo")).lost] == ["rl"]
    got = spec(imported(change(AXOLOTL, rl="dpo", trl={"beta": 0.4})))
    assert got.train.preference.beta == 0.4


@pytest.mark.parametrize(
    ("entry", "form", "columns", "lost"),
    [
        ({"type": "sharegpt", "conversation": "chatml"}, "sharegpt", {}, []),
        ({"type": "chat_template", "roles_to_train": ["assistant"]}, "messages", {}, []),
        (
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            "sharegpt", {}, [],
        ),
        ({"type": "chat_template", "field_messages": "turns"}, "auto", {}, ["datasets.0.type"]),
        ({"type": {"field_instruction": "q", "field_output": "a"}}, "auto", {"prompt": "q", "answer": "a"}, []),
        ({"type": "context_qa"}, "auto", {"prompt": "question", "answer": "answer", "context": "article"}, []),
        ({"type": "completion", "field": "text"}, "auto", {}, ["datasets.0.type", "datasets.0.field"]),
        ({"type": "alpaca", "shards": 4, "novel": 1}, "alpaca", {}, ["datasets.0.shards", "datasets.0.novel"]),
    ],
)  # fmt: skip
def test_axolotl_datasets(entry: dict[str, Any], form: str, columns: dict[str, str], lost: list[str]) -> None:
    found = imported(
        change(
            AXOLOTL.replace("  - path: rows.jsonl\n    type: alpaca\n", ""), datasets=[{"path": "rows.jsonl", **entry}]
        )
    )
    data = spec(found).data
    assert data.format == form
    assert {key: value for key, value in data.columns.model_dump().items() if value} == columns
    assert sorted(finding.key for finding in found.lost) == sorted(lost)
    assert {finding.key for finding in found.findings} >= {f"datasets.0.{key}" for key in entry}


def test_axolotl_hub_datasets_and_held_back_ones() -> None:
    base = AXOLOTL.replace("  - path: rows.jsonl\n    type: alpaca\n", "").replace("val_set_size: 0.05\n", "")
    entry = {"path": "acme/faq", "name": "en", "revision": "v2", "type": "alpaca"}
    got = spec(
        imported(change(base, datasets=[{**entry, "split": "first"}], test_datasets=[{**entry, "split": "held"}]))
    )
    assert got.data.path == "hf:acme/faq:en@v2"
    assert (got.data.splits.train, got.data.splits.validation) == (("first",), ("held",))
    found = imported(
        change(
            base, datasets=[{**entry, "split": "train[:10%]"}], test_datasets=[{"path": "other/set", "type": "alpaca"}]
        )
    )
    spec(found)
    assert sorted(finding.key for finding in found.lost) == ["datasets.0", "test_datasets.0"]


def test_axolotl_padding_is_harmless_and_other_tokens_are_not() -> None:
    assert imported(change(AXOLOTL, special_tokens={"pad_token": "<p>"})).lost == ()
    assert len(imported(change(AXOLOTL, special_tokens={"eos_token": "<e>"})).lost) == 1


# --------------------------------------------------------------------------------------------------------- Olive


def workflow(kind: str, **keys: Any) -> str:
    data = {
        "name": "letters", "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": "rows.jsonl", "split": "train"},
        "pre_process_data_config": {
            "text_template": "{instruction} {output}", "strategy": "line-by-line", "max_seq_len": 256,
        },
    }  # fmt: skip
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "num_train_epochs": 2}
    tune = {"type": kind, "r": 8, "alpha": 24, "train_data_config": "letters", "training_args": {**arguments, **keys}}
    return json.dumps(
        {
            "input_model": {"type": "HfModel", "model_path": "acme/small-1b"},
            "data_configs": [data],
            "passes": {"tune": tune, "convert": {"type": "OnnxConversion"}},
        },
        indent=1,
    )


def test_olive_embeddings_beside_low_rank_weights() -> None:
    flow = json.loads(workflow("LoRA"))
    flow["passes"]["tune"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    assert spec(imported(json.dumps(flow), "flow.json")).train.lora.embeddings
    flow["passes"]["tune"]["modules_to_save"] = ["score"]
    assert "pass.modules_to_save" in imported(json.dumps(flow), "flow.json").text


@pytest.mark.parametrize(("kind", "tuning"), [("LoRA", "lora"), ("QLoRA", "qlora"), ("DoRA", "dora")])
def test_olive_workflow(kind: str, tuning: str) -> None:
    found = imported(workflow(kind, warmup_steps=2, lr_scheduler_type="cosine"), "flow.json")
    assert found.trainer == "olive"
    got = spec(found)
    train = got.train
    assert (train.tuning, train.lora.rank, train.lora.strength, train.lora.dropout) == (tuning, 8, 24.0, 0.05)
    assert (train.batch_size, train.accumulate, train.epochs, train.batching) == (20, 5, 2.0, "bucket")
    assert train.warmup == 0.25  # 80 rows in batches of 20, twice: 8 steps
    assert (train.learning_rate, train.precision, train.prompt_weight, train.max_length) == (2e-4, "bf16", 1.0, 256)
    assert (got.data.path, got.data.columns.prompt, got.data.columns.answer) == ("rows.jsonl", "instruction", "output")
    assert "passes.convert" in kinds(found, "ignored")
    assert found.lost == ()


@pytest.mark.parametrize(("kind", "tuning"), [("LoHa", "lora"), ("LoKr", "lora"), ("LoftQ", "qlora")])
def test_olive_kinds_without_counterpart(kind: str, tuning: str) -> None:
    found = imported(workflow(kind), "flow.json")
    assert spec(found).train.tuning == tuning
    assert [finding.key for finding in found.lost] == ["passes.tune.type"]


def test_olive_options_and_command_line_say_the_same() -> None:
    options = imported(OLIVE)
    line = (
        "# tune it\nolive finetune -m acme/small-1b --data_name acme/letters \\\n"
        '  --text_template "Q: {question} A: {reply}" --method=lora --lora-r 16 --lora_alpha 32 --max_steps 200\n'
    )
    command = imported(line, "tune.sh")
    assert spec(options).model_copy(update={"name": ""}) == spec(command).model_copy(update={"name": ""})
    got = spec(command)
    assert (got.train.max_steps, got.train.batch_size, got.train.lora.rank, got.train.lora.strength) == (
        200,
        8,
        16,
        32.0,
    )
    assert (got.train.final_learning_rate, got.train.warmup, got.train.batching) == (1.0, 0.0, "pack")
    assert (got.data.path, got.data.max_examples, got.train.max_length) == ("hf:acme/letters", 256, 1024)
    assert (got.data.columns.prompt, got.data.columns.answer) == ("question", "reply")


def test_olive_evaluation_split_and_chat() -> None:
    text = change(
        OLIVE,
        eval_split="dev",
        use_chat_template=True,
        target_modules="q_proj,v_proj",
        method="qlora",
        torch_dtype="float32",
    )
    got = spec(imported(text.replace('text_template: "Q: {question} A: {reply}"\n', "")))
    assert (got.data.format, got.data.splits.validation, got.task.type) == ("messages", ("dev",), "chat")
    assert (got.train.tuning, got.train.lora.targets, got.train.precision) == ("qlora", ("q_proj", "v_proj"), "fp32")


def test_olive_raw_text_is_named() -> None:
    found = imported(OLIVE.replace('text_template: "Q: {question} A: {reply}"', "text_field: text"))
    spec(found)
    assert "only prompts with answers" in found.lost[0].note


# ----------------------------------------------------------------------------------- whose file it is, and bad ones


def test_trainers_are_told_apart() -> None:
    for text, name in ((FACTORY, "llamafactory"), (AXOLOTL, "axolotl"), (OLIVE, "olive")):
        assert imported(text).trainer == name
    assert not any(detect({"learning_rate": 1, "seed": 2}).values())


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("", (), "the file is empty or not a mapping"),
        ("- a\n- b\n", (), "file.yaml:1: the file is empty or not a mapping"),
        ("a: [1\nb: 2\n", (), "file.yaml:2: "),
        ("a: 1\na: 2\n", (), "file.yaml:2: "),
        ("base_model: a/b\nlearning_rate: 1e-4\ndatasets: &d [*d]\n", (), "file.yaml:3: datasets: entry 1 has no path"),
        ("base_model: a/b\n1: 2\n", (), "file.yaml:2: the key 1 is not a word"),
        ("seed: 1\nlearning_rate: 1\n", (), "no key by which a trainer could be told"),
        ("base_model: a/b\ndataset: faq\n", (), "could be of several trainers"),
        (AXOLOTL, ("--from", "llamafactory"), "file.yaml:1: base_model: only Axolotl has this key"),
        (FACTORY, ("--from", "olive"), "only LLaMA-Factory has this key"),
        (change(FACTORY, learning_rate="fast"), (), "file.yaml:16: learning_rate: must be a number (given: 'fast')"),
        (change(FACTORY, per_device_train_batch_size=1.5), (), "per_device_train_batch_size: must be a whole number"),
        (change(FACTORY, finetuning_type="prefix"), (), "'prefix' is not one of: lora, full, freeze, oft"),
        (change(FACTORY, stage="ppo"), (), "file.yaml:16: stage: ppo has no counterpart"),
        (change(FACTORY, dataset=""), (), "dataset: names no dataset"),
        (FACTORY.replace("dataset: faq\n", ""), (), "has no dataset"),
        (FACTORY.replace("model_name_or_path: acme/small-1b\n", ""), (), "has no model_name_or_path"),
        (change(AXOLOTL, rl="kto"), (), "rl: kto has no counterpart"),
        (change(AXOLOTL, reward_model=True), (), "reward_model: reward models have no counterpart"),
        (AXOLOTL.replace("path: rows.jsonl", "source: rows.jsonl"), (), "file.yaml:2: datasets: entry 1 has no path"),
        (
            '{"input_model": "a/b", "passes": {"c": {"type": "OnnxConversion"}}}',
            (),
            "no pass of this workflow fine-tunes",
        ),
        ("olive finetune --data_name 'x\n", (), "cannot be taken apart"),
        (change(FACTORY, learning_rate=0), (), "train.learning_rate: must be greater than 0"),
        (change(FACTORY, lora_dropout=1.5), (), "train.lora.dropout: must be less than or equal to 1"),
    ],
)
def test_bad_files_get_a_line_and_a_hint(text: str, words: tuple[str, ...], says: str, slmops: Slmops) -> None:  # noqa: F811
    Path("file.yaml").write_text(text)
    slmops("import", "file.yaml", *words).refused(2, says)


def test_every_wrong_value_comes_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        imported(change(FACTORY, learning_rate="fast", num_train_epochs="many", stage="rm"))
    for key in ("learning_rate", "num_train_epochs", "stage"):
        assert f": {key}: " in caught.value.message


# ---------------------------------------------------------------------------------------------------- the command


def test_command_writes_tells_and_does_not_overwrite(slmops: Slmops) -> None:  # noqa: F811
    text = change(FACTORY, neftune_noise_alpha=5, hf_hub_token="hf_secret", report_to="none")
    Path("file.yaml").write_text(text)
    first = slmops("import", "file.yaml")
    assert (first.code, first.out) == (0, "slmops.yaml\n")
    assert "file.yaml:17: neftune_noise_alpha: noise on embeddings" in first.err
    assert "file.yaml:18: hf_hub_token: " in first.err
    assert "file.yaml:10: per_device_train_batch_size → train.batch_size: 2 per device × 8" in first.err
    written = Path("slmops.yaml").read_text()
    assert "hf_secret" not in written + first.err
    slmops("import", "file.yaml").refused(2, "slmops.yaml is there already")
    assert Path("slmops.yaml").read_text() == written
    assert slmops("import", "file.yaml", "--force").code == 0
    other = slmops("import", "file.yaml", "--out", "new/deep/p.yaml", "--json")
    assert other.code == 0
    assert load(Path("new/deep/p.yaml")).spec.data.path == "../../sets/faq.json"
    said = json.loads(other.out)
    assert said["trainer"] == "llamafactory"
    assert said["settings"]["train.batch_size"] == 16
    assert {entry["key"] for entry in said["ignored"]} >= {"neftune_noise_alpha", "hf_hub_token"}
    slmops("import", "gone.yaml", "--force").refused(2, "there is no file gone.yaml")


def test_local_models_are_found_from_where_one_stands() -> None:
    Path("models/tiny").mkdir(parents=True)
    assert spec(imported(change(FACTORY, model_name_or_path="models/tiny"))).student.base == "models/tiny"
    assert spec(imported(change(FACTORY, model_revision="abc"))).student.base == "hf:acme/small-1b@abc"
    found = imported(change(FACTORY, model_name_or_path="./models/none"))
    assert spec(found).student.base == "./models/none"
    assert "no such folder" in kinds(found, "changed")["model_name_or_path"]


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70_000), st.floats(allow_nan=True), st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.sampled_from(["type", "beta", "path", "min_lr", "weight_dtype"]), st.integers(0, 3), max_size=2),
    st.sampled_from(["lora", "qlora", "dpo", "orpo", "int4", "auto", "cosine", "epoch", "linear", "all", "sft", "faq", "1e-4"]),
)  # fmt: skip
BASES = {"llamafactory": FACTORY, "axolotl": AXOLOTL, "olive": OLIVE}
TOPS = {
    "llamafactory": sorted(TRAINERS["llamafactory"].TABLE),
    "axolotl": sorted(TRAINERS["axolotl"].TABLE),
    "olive": sorted({*olive_form.OPTIONS, *(key for key in TRAINERS["olive"].TABLE if "." not in key)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_key_is_named_or_refused(trainer: str, data: st.DataObject) -> None:
    keys = data.draw(st.dictionaries(st.sampled_from([*TOPS[trainer], "novel"]), JUNK, min_size=1, max_size=4))
    try:
        found = imported(change(BASES[trainer], **keys), trainer=trainer)
    except SlmopsError as error:
        assert error.message and error.exit_code == 2
        return
    named = {finding.key.partition(".")[0] for finding in found.findings}
    assert set(keys) <= named
    assert all(finding.note for finding in found.findings if finding.kind == "ignored")
    assert all(finding.line for finding in found.findings if finding.key)
    try:
        spec(found)
    except SlmopsError as error:  # a number out of range: slmops' own reader says so
        assert error.exit_code == 2


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_key_of_the_table_of_ignored_ones_is_named_with_its_reason(trainer: str) -> None:
    ignored = {key: rule for key, rule in TRAINERS[trainer].IGNORED.items() if key in TOPS[trainer]}
    found = imported(change(BASES[trainer], **dict.fromkeys(ignored, "word")), trainer=trainer)
    spec(found)
    assert {key: note for key, note in kinds(found, "ignored").items() if key in ignored} == {
        key: rule.reason for key, rule in ignored.items()
    }
    lost = {finding.key for finding in found.lost}
    assert lost == {key for key, rule in ignored.items() if rule.changes}
    for key in ignored:
        assert f"\n#   {key}: " in found.text
