"""`plan(spec)`: the steps that a project file asks for, in an order in which each comes after its inputs. Pure.

    data ─┬─ tokenizer ─ teacher ─┬─ prompts ─ answers ─ synthetic ─┬─ logits ─ student ─┬─ conversions ─ predictions ─┐
          └───────────────────────┴─────────────────────────────────┴─ few, all ─────────┘        measure ─ report ─ bundle

Names of model variants: `teacher-torch`, `teacher-fp32`, `student-fp32`, `student-int4`, `few-int4`, `all-int4`;
`few` and `all` are the student without the teacher, on its few gold labels and on all of them. Where `compress` asks for it,
there is the student before each of its steps too: `unpruned` before anything was taken out of it (`slmops.flow.pruning`), `whole`
before its vocabulary was trimmed (`student-trimmed`), `nearest` before its weights were rounded by calibration
(`student-rounded`). `student-FORMAT-KIND`: what `convert.also` asks for (`slmops.core.forms`); `student-olive-NAME`: what
`convert.olive` does. Adapters of further tasks are planned by `slmops.flow.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from slmops.core import forms
from slmops.core.spec import (
    PREFERENCE,
    Architecture,
    Data,
    Gold,
    Precision,
    Spec,
    Task,
    TokenizerSpec,
    Training,
)
from slmops.core.step import Step
from slmops.errors import SpecError
from slmops.flow import adapters, chain, pruning
from slmops.flow.checks import check, no_gold, supervised_first
from slmops.train.shape import parameters

SMALL = 30_000_000
"""Models below this many parameters do not gain from a second thread; they train beside each other instead. Measured on
two cores with 0.5 and 11.4 M parameters: batches of short rows end before a second thread is awake."""


def plan(spec: Spec) -> tuple[Step, ...]:
    """The steps of a project.

    Raises:
        SpecError: stages that do not fit each other, all of them at once.
    """
    problems = check(spec)
    if problems:
        raise SpecError(problems)
    builder = _Builder(spec)
    builder.build()
    return tuple(builder.steps)


VALIDATION = "data/validation.jsonl"


def _validation(spec: Spec) -> str | None:
    """What the trainings of a student look at: the validation split. Beside a teacher, where `data.gold` counts the labels that the
    student has, that split would be labels beyond those: there each training holds out some of its own examples."""
    return None if spec.teacher is not None and spec.data.gold != Gold() else VALIDATION


def _json(value: Any) -> Any:
    return value.model_dump(mode="json")


def held(spec: Spec, runtime: str) -> dict[str, Any]:
    """The parameter that says how a runtime holds keys and values, if the file does."""
    return {"kv_cache": spec.evaluate.kv_cache} if spec.evaluate.kv_cache and runtime == "llama_cpp" else {}


def _is_hub(path: str) -> bool:
    return path.startswith("hf:")


TRIMMED, ROUNDED = "student-trimmed", "student-rounded"
WIDTHS, SCALED = "student-widths", "student-scaled"


def finished(spec: Spec) -> str:
    """The step whose model is the student in full precision, with the vocabulary that ships."""
    return pruning.last(spec) if spec.compress.vocabulary == "whole" else TRIMMED


class _Builder:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.steps: list[Step] = []
        self.taught: tuple[list[str], dict[str, str]] = ([], {})
        self.texts: tuple[list[str], dict[str, str]] = ([], {})
        self.others: dict[str, float] = {}
        self.shipped = f"student-{spec.convert.precision}"

    def add(
        self, id: str, method: str, params: Mapping[str, Any], about: str, inputs: Mapping[str, str] | None = None,
        sources: Mapping[str, str] | None = None, seed: int | None = None, threads: int = 0,
    ) -> str:  # fmt: skip
        seed = self.spec.seed if seed is None else seed
        if id == "student" and self.spec.train.quantization_aware == "ternary":
            about += ", ternary"
        self.steps.append(Step(id, method, dict(params), dict(inputs or {}), dict(sources or {}), seed, threads, about))
        return id

    def build(self) -> None:
        spec = self.spec
        teacher = spec.teacher
        self._data()
        if teacher is not None and teacher.model is not None:
            self._teacher(teacher.model)
        elif teacher is not None and teacher.base is not None:
            self._fetch("teacher", teacher.base)
        self._other_teachers()
        self._synthesis()
        self._students()
        if spec.adapters:
            adapters.steps(spec, self)
        self._judge()

    def _data(self) -> None:
        teacher = self.spec.teacher
        trains = teacher is not None and teacher.model is not None
        pairs = self.spec.train.method in PREFERENCE
        self.prepare("data", self.spec.data, self.spec.task, trains, "read, split, keep test data apart", pairs)

    def prepare(self, id: str, data: Data, task: Task, needs_teacher: bool, about: str, pairs: bool = False) -> str:
        sources = {} if _is_hub(data.path) else {"source": data.path}
        asked = _json(data)
        asked.pop("augment")
        if sources:
            asked["path"] = PurePosixPath(data.path).name
        params = {"data": asked, "task": _json(task), "needs_teacher": needs_teacher}
        if pairs:
            params["needs_pairs"] = True
        return self.add(id, "data.prepare", params, about, sources=sources, threads=1, seed=0)

    def _fetch(self, id: str, base: str, runtime: str | None = "onnx_genai") -> str:
        local = not _is_hub(base)
        params: dict[str, Any] = {"model": PurePosixPath(base).name if local else base, "runtime": runtime}
        if id == "student-base":
            formats = sorted({forms.split(form)[0] for form in self.spec.convert.also})
            params |= {"gguf": True} if "gguf" in formats else {}
            others = [name for name in formats if name != "gguf"]
            params |= {"formats": others} if others else {}
        if id == "student-base" and self.spec.compress.prune is not None:
            params["prune"] = pruning.shape(self.spec.compress.prune)
        if id == "student-base" and self.spec.train.quantization_aware == "ternary":
            params["ternary"] = True
        about = "check the model folder" if local else f"get {base[3:]}"
        return self.add(id, "catalog.fetch", params, about, sources={"model": base} if local else {}, threads=1)

    def _teacher(self, model: Architecture) -> None:
        teacher = self.spec.teacher
        assert teacher is not None
        seed = self._teacher_seed()
        self._tokenizer("teacher-tokenizer", teacher.tokenizer)
        files, inputs = self.augmented("teacher", ["data/teacher.jsonl"], {"data": "data"}, self.spec.data)
        self.taught = (files, inputs | {"tokenizer": "teacher-tokenizer"})
        self._train_teacher("teacher", model, teacher.train, seed)

    def _train_teacher(self, id: str, model: Architecture, training: Training, seed: int) -> None:
        files, inputs = self.taught
        params = {
            "training": _json(training),
            "architecture": _json(model),
            "files": files,
            "validation": VALIDATION,
        }
        assert self.spec.teacher is not None
        size = parameters(model, self.spec.teacher.tokenizer.vocabulary)
        self.add(
            id, "train.sft", params, f"train the {id} ({size / 1e6:.1f} M parameters)", inputs, seed=seed,
            threads=self._teacher_threads(),
        )  # fmt: skip

    def _other_teachers(self) -> None:
        """`teacher-2`, `teacher-3`, …, each with its weight in the mean."""
        teacher = self.spec.teacher
        first = self._teacher_seed()
        for place, other in enumerate(() if teacher is None else teacher.others, 2):
            id = f"teacher-{place}"
            if other.model is not None:
                seed = first + place - 1 if other.seed is None else other.seed
                self._train_teacher(id, other.model, other.train, seed)
            else:
                assert other.base is not None
                self._fetch(id, other.base, runtime=None)  # never converted: it only answers
            self.others[id] = other.weight

    def augmented(
        self, model: str, files: list[str], inputs: Mapping[str, str], data: Data
    ) -> tuple[list[str], dict[str, str]]:
        """Files and inputs of a training, with the augmented copies of its examples if `data` wants some."""
        augment = data.augment
        if augment is None:
            return files, dict(inputs)
        params = {"augment": _json(augment), "files": files, "overlap": _json(data.overlap)}
        asked = {name: step for name, step in inputs.items() if name in ("data", "synthetic")}
        about = f"copies with other values ({augment.method}) for {model}"
        id = self.add(f"augmented-{model}", "data.augment", params, about, asked, threads=1, seed=0)
        return [*files, "augmented/train.jsonl"], {**inputs, "augmented": id}

    def _teacher_seed(self) -> int:
        """Of all that a teacher does for every student alike, so that students of other seeds share it."""
        teacher = self.spec.teacher
        return self.spec.seed if teacher is None or teacher.seed is None else teacher.seed

    def _tokenizer(self, id: str, tokenizer: TokenizerSpec) -> str:
        about = "byte-level BPE of the training text"
        return self.add(id, "train.tokenizer", _json(tokenizer), about, {"data": "data"}, threads=1, seed=0)

    def _local_teacher(self) -> dict[str, str]:
        return {"teacher": "teacher"} if any(step.id == "teacher" for step in self.steps) else {}

    def _teacher_threads(self) -> int:
        """One thread for a teacher that is small enough to be trained here, all of them for another."""
        teacher = self.spec.teacher
        model = teacher.model if teacher is not None else None
        return 1 if teacher and model and parameters(model, teacher.tokenizer.vocabulary) < SMALL else 0

    def _endpoint(self) -> Any:
        teacher = self.spec.teacher
        return _json(teacher.endpoint) if teacher is not None and teacher.endpoint is not None else None

    def _synthesis(self) -> None:
        spec, synthesize = self.spec, self.spec.synthesize
        task, endpoint = _json(spec.task), self._endpoint()
        inputs = {"data": "data"}
        if synthesize.generate is not None:
            generate = {"generate": _json(synthesize.generate), "task": task, "endpoint": endpoint}
            what = f"{synthesize.generate.count} new prompts ({synthesize.generate.method})"
            template = synthesize.generate.method == "template"
            asked = inputs | ({} if template else self._local_teacher())
            if template or synthesize.shards == 1:
                self.add("prompts", "data.generate", generate, what, asked, threads=self._teacher_threads())
            else:
                self._prompts(generate, what, asked, synthesize.shards)
            inputs = inputs | {"prompts": "prompts"}
        if spec.teacher is None or not (synthesize.label_pool or synthesize.generate is not None):
            return
        params = {
            "label_pool": synthesize.label_pool,
            "votes": synthesize.votes,
            "vote_temperature": synthesize.vote_temperature,
            "max_new_tokens": spec.teacher.max_new_tokens,
            "task": task,
            "endpoint": endpoint,
            "guided": spec.teacher.instructed,
        }
        inputs = inputs | self._local_teacher()
        chance = synthesize.votes > 1 or spec.teacher.instructed  # else greedy answers to plain prompts
        seed = spec.seed if chance else 0
        answers = self._answers(params, inputs, seed, synthesize.shards)
        filters = {
            "filters": _json(synthesize.filters),
            "overlap": _json(spec.data.overlap),
            "task": task,
            "endpoint": endpoint if synthesize.filters.judge else None,
        }
        judge = self._local_teacher() if synthesize.filters.judge else {}
        self.add(
            "synthetic",
            "data.filter",
            filters,
            "keep what is sound",
            answers | {"data": "data"} | judge,
            threads=1,
        )

    def _prompts(self, generate: dict[str, Any], about: str, inputs: dict[str, str], parts: int) -> None:
        """New prompts in parts, and all of them together as `prompts`."""
        made = {
            f"prompts.{part}": self.add(
                f"prompts-{part}", "data.generate", generate | {"part": part - 1, "parts": parts},
                f"{about}, part {part} of {parts}", inputs, threads=self._teacher_threads(),
            )
            for part in range(1, parts + 1)
        }  # fmt: skip
        params = {key: generate[key] for key in ("generate", "task")}
        self.add(
            "prompts", "data.join_prompts", params, "one set of the parts", {"data": "data"} | made, threads=1, seed=0
        )

    def _answers(self, params: dict[str, Any], inputs: dict[str, str], seed: int, parts: int) -> dict[str, str]:
        """The step in which the teacher answers, or one for each part; by the name that the filter takes it under."""
        threads, about = self._teacher_threads(), "the teacher answers"
        if parts == 1:
            return {"answers": self.add("answers", "data.answer", params, about, inputs, seed=seed, threads=threads)}
        return {
            f"answers.{part}": self.add(
                f"answers-{part}", "data.answer", params | {"part": part - 1, "parts": parts},
                f"{about}, part {part} of {parts}", inputs, seed=seed, threads=threads,
            )
            for part in range(1, parts + 1)
        }  # fmt: skip

    def _students(self) -> None:
        spec = self.spec
        student, has = spec.student, {step.id for step in self.steps}
        inputs: dict[str, str] = {"data": "data"}
        vocabulary = 0
        if student.base is not None:
            inputs["base"] = self._fetch("student-base", student.base)
        elif isinstance(student.tokenizer, TokenizerSpec):
            vocabulary = student.tokenizer.vocabulary
            inputs["tokenizer"] = self._tokenizer("student-tokenizer", student.tokenizer)
        elif "teacher-tokenizer" in has:
            assert spec.teacher is not None
            vocabulary = spec.teacher.tokenizer.vocabulary
            inputs["tokenizer"] = "teacher-tokenizer"
        elif "teacher" in has:
            inputs["tokenizer"] = "teacher"
        else:
            vocabulary = TokenizerSpec().vocabulary
            inputs["tokenizer"] = self._tokenizer("student-tokenizer", TokenizerSpec())
        small = student.model is not None and parameters(student.model, vocabulary) < SMALL
        threads = 1 if small else 0
        training = Training.model_validate(
            {name: getattr(spec.train, name) for name in Training.model_fields}, strict=False
        )
        architecture = _json(student.model) if student.model is not None else None
        files = ["data/gold.jsonl", *(["synthetic/train.jsonl"] if "synthetic" in has else [])]
        files, taught = self.augmented(
            "student", files, inputs | ({"synthetic": "synthetic"} if "synthetic" in has else {}), spec.data
        )
        common = {"architecture": architecture, "validation": _validation(spec)}
        params = {"training": _json(spec.train), "files": files} | common
        method, teacher_threads = spec.train.method, self._teacher_threads()
        if method == "logits":
            cache = {
                "files": files,
                "samples": spec.train.logit_samples,
                "selection": spec.train.logit_selection,
                "temperature": spec.train.temperature,
                "max_length": spec.train.max_length,
                "weights": self.others,
                "precision": spec.train.precision,
                "batch_size": spec.train.teacher_batch,
            }
            asked = taught | {"teacher": "teacher"} | {f"teacher.{id}": id for id in self.others}
            about = "one teacher pass: its distributions, cached"
            self.add(
                "logits", "train.cache_logits", cache, about, asked, seed=self._teacher_seed(), threads=teacher_threads
            )
            about = "distil the student (logits)"
            self.add("student", "train.logits", params, about, taught | {"logits": "logits"}, threads=threads)
        elif method == "cross_tokenizer":
            cache = {
                "files": files,
                "max_length": spec.train.max_length,
                "precision": spec.train.precision,
                "batch_size": spec.train.teacher_batch,
            }
            about = "one teacher pass, cut where both tokenizers cut"
            asked = taught | {"teacher": "teacher"}
            self.add("aligned", "train.cache_aligned", cache, about, asked, threads=teacher_threads, seed=0)
            about = "distil the student (another tokenizer)"
            self.add(
                "student", "train.cross_tokenizer", params, about, taught | {"aligned": "aligned"}, threads=threads
            )
        elif method in ("on_policy", "hidden_states"):
            word = "the student writes, the teacher scores" if method == "on_policy" else "imitate the teacher's inside"
            asked = taught | {"teacher": "teacher"}
            self.add("student", f"train.{method}", params, f"distil the student ({word})", asked, threads=threads)
        elif method in PREFERENCE:
            start, own = common, taught
            if supervised_first(spec):
                training = spec.train.preference.supervised
                params = {"training": _json(training), "files": files} | common
                self.add("student-sft", "train.sft", params, "learn the chosen answers first", taught, threads=threads)
                start, own = common | {"architecture": None}, {"data": "data", "base": "student-sft"}
            params = {"training": _json(spec.train), "files": ["data/gold.jsonl"]} | start
            word = f"learn from pairs ({method})"
            self.add("student", f"train.{method}", params, word, own, threads=threads)
        else:
            params = {"training": _json(training), "files": files} | common
            word = "distil the student (sequence level)" if "synthetic" in has else "train the student"
            self.add("student", "train.sft", params, word, taught, threads=threads)
        self._compress(files, taught, threads)
        gold = {"few": "data/gold.jsonl", "all": "data/oracle.jsonl"}
        without = {
            "few": "the student without the teacher, its gold only",
            "all": "the student without the teacher, all gold",
        }
        baselines = [name for name in spec.evaluate.baselines if not (name == "few" and no_gold(spec))]
        for name in baselines if spec.teacher is not None else ():
            files, learned = self.augmented(name, [gold[name]], inputs, spec.data)
            params = {"training": _json(training), "files": files} | common
            self.add(name, "train.sft", params, without[name], learned, threads=threads)

    def _compress(self, files: list[str], taught: Mapping[str, str], threads: int) -> None:
        """What pruning asks for, then `student-trimmed`, `student-widths`, `student-scaled`, `student-rounded`. Prompts without labels
        count as texts too."""
        compress = self.spec.compress
        texts = [*files, "data/pool.jsonl"]
        inputs = {name: step for name, step in taught.items() if name in ("data", "synthetic", "augmented")}
        self.texts = texts, inputs
        pruning.steps(self.spec, self, texts, inputs, threads)
        if compress.vocabulary == "seen":
            params: dict[str, Any] = {"files": texts, "at_least": compress.vocabulary_at_least}
            about = "leave out the tokens that the task has no use for"
            self.add(
                TRIMMED,
                "compress.vocabulary",
                params,
                about,
                {"model": pruning.last(self.spec)} | inputs,
                threads=1,
                seed=0,
            )
        convert = self.spec.convert
        params = {"files": texts, "examples": compress.calibration_examples, "block_size": convert.block_size}
        given = {"model": finished(self.spec)} | inputs
        if convert.file_mb is not None:
            about = "the bits of each matrix for the size of file"
            self.add(
                WIDTHS,
                "compress.sensitivity",
                params | {"file_mb": convert.file_mb},
                about,
                given,
                seed=0,
                threads=threads,
            )
            given["widths"] = WIDTHS
        method: str = compress.quantization
        if method.startswith("awq+"):
            method = method.removeprefix("awq+")
            about = "scale inputs by what training texts make of them (AWQ)"
            self.add(SCALED, "compress.awq", params | {"round": False}, about, given, seed=0, threads=threads)
            given["model"] = SCALED
        if method != "none":
            about = f"round by what training texts make of the weights ({method})"
            self.add(ROUNDED, f"compress.{method}", params, about, given, seed=0, threads=threads)

    def _convert(self, model: str, precision: Precision) -> str:
        """`MODEL-PRECISION`. Models: those that were trained, `student` compressed if that is asked for, `whole` with its whole
        vocabulary, `unpruned` with all that it had after training, `nearest` with its weights rounded each alone."""
        done = finished(self.spec)
        own = {"unpruned": "student", "whole": pruning.last(self.spec), "student": done, "nearest": done}
        trained = own.get(model, model)
        if model == "student" and precision == "int4" and self.spec.compress.quantization != "none":
            trained = ROUNDED
        convert = self.spec.convert.onnx(precision)
        aware = self.spec.train.quantization_aware if model != "teacher" else "off"
        trained_for = {"int4": "plain", "ternary": "ternary"}.get(aware, "search")
        rounding = convert["rounding"] or trained_for
        params = convert | {"rounding": rounding}
        inputs = {"model": trained, "data": "data"}
        if precision == "int4" and model in ("student", "nearest") and self.spec.convert.file_mb is not None:
            params["file_mb"] = self.spec.convert.file_mb
            inputs["widths"] = WIDTHS
        threads = 1
        about = f"{model} to ONNX Runtime GenAI, {precision}"
        return self.add(
            f"{model}-{precision}",
            "convert.onnx_genai",
            params,
            about,
            inputs,
            threads=threads,
            seed=0,
        )

    def _form(self, form: str) -> str:
        """`student-FORMAT-KIND`: from the rounded student where that one's weights lie on the form's grid already."""
        convert, (name, kind) = self.spec.convert, forms.split(form)
        format = forms.FORMATS[name]
        rounded = self.spec.compress.quantization != "none" and convert.file_mb is None
        checked = {"fidelity_prompts": convert.fidelity_prompts, "min_token_agreement": convert.min_token_agreement}
        params: dict[str, Any] = {"precision": kind} | checked
        kept, extra = False, dict[str, str]()
        if name == "gguf":
            kept = rounded and kind == "q4_0" and convert.block_size == 32
            weighed = convert.importance and not kept and kind not in ("fp32", "fp16", "bf16", "q8_0")
            files = self.texts[0] if weighed else []
            params |= {"files": files, "examples": self.spec.compress.calibration_examples}
            extra = self.texts[1] if weighed else {}
        elif name in ("mlx", "openvino") and kind in ("int8", "int4"):
            kept = rounded and kind == "int4"
            aware = self.spec.train.quantization_aware == "int4"
            params["block_size"] = convert.block_size
            params["rounding"] = convert.rounding or ("plain" if aware else "search")
            if kind == "int4" and convert.embedding_precision == "int8":
                params["embedding_precision"] = "int8"
        elif name in ("litert", "executorch") and kind == "int4":
            kept = rounded
            params["block_size"] = convert.block_size
            if convert.embedding_precision == "int8":
                params["embedding_precision"] = "int8"
        inputs = {"model": ROUNDED if kept else finished(self.spec), "data": "data"} | extra
        about = f"student to {format.name}, {kind}"
        return self.add(f"student-{form}", format.method, params, about, inputs, threads=1, seed=0)

    def _olive(self, name: str, file: str) -> str:
        """`student-olive-NAME`: the student through a workflow of Olive."""
        convert = self.spec.convert
        params = {
            "files": self.texts[0], "examples": self.spec.compress.calibration_examples,
            "fidelity_prompts": convert.fidelity_prompts, "min_token_agreement": convert.min_token_agreement,
        }  # fmt: skip
        inputs = {"model": finished(self.spec), "data": "data"} | self.texts[1]
        about = f"the student through Olive, {PurePosixPath(file).name}"
        return self.add(f"student-olive-{name}", "convert.olive", params, about, inputs, {"config": file}, seed=0)

    def _told(self, variant: str) -> dict[str, Any]:
        """An instructed teacher is judged with the prompts that it labels with."""
        teacher = self.spec.teacher
        instructed = teacher is not None and teacher.instructed and variant.startswith("teacher")
        return {"guided": _json(self.spec.task)} if instructed else {}

    def _judge(self) -> None:
        spec, has = self.spec, {step.id for step in self.steps}
        shipped, precision = self.shipped, spec.convert.precision
        models: dict[str, tuple[str, str]] = {}
        if "teacher" in has:
            models["teacher-torch"] = ("teacher", "torch")
            models["teacher-fp32"] = (self._convert("teacher", "fp32"), "onnx_genai")
        models["student-fp32"] = (self._convert("student", "fp32"), "onnx_genai")
        if shipped != "student-fp32":
            models[shipped] = (self._convert("student", precision), "onnx_genai")
        for form in spec.convert.also:
            models[f"student-{form}"] = (self._form(form), forms.FORMATS[forms.split(form)[0]].runtime)
        for name, file in spec.convert.olive.items():
            models[f"student-olive-{name}"] = (self._olive(name, file), "onnx_genai")
        if spec.compress.quantization != "none":
            models["nearest-int4"] = (self._convert("nearest", precision), "onnx_genai")
        if TRIMMED in has:
            models[f"whole-{precision}"] = (self._convert("whole", precision), "onnx_genai")
        if spec.compress.prune is not None:
            models[f"unpruned-{precision}"] = (self._convert("unpruned", precision), "onnx_genai")
        for name in ("few", "all"):
            if name in has:
                models[f"{name}-{precision}"] = (self._convert(name, precision), "onnx_genai")
        predictions = {}
        judged = {"max_new_tokens": spec.evaluate.max_new_tokens, "max_examples": spec.evaluate.max_examples}
        for variant, (step, runtime) in models.items():
            size = self._teacher_threads() if variant.startswith("teacher") else 1
            seed = spec.seed if self._told(variant) else 0
            predictions[f"predictions.{variant}"] = self.add(
                f"predict-{variant}", "evaluate.predict", judged | {"runtime": runtime} | held(spec, runtime) | self._told(variant),
                f"{variant} on the test data",
                {"model": step, "data": "data"}, threads=size, seed=seed,
            )  # fmt: skip
        if self._endpoint() is not None:
            predictions["predictions.teacher-endpoint"] = self.add(
                "predict-teacher-endpoint", "evaluate.predict_endpoint", judged | {"endpoint": self._endpoint()} | self._told("teacher"),
                "the remote teacher on the test data", {"data": "data"},
            )  # fmt: skip
        unmeasured = tuple(f"student-{name}-" for name, format in forms.FORMATS.items() if not format.measured)
        measured = {v: m for v, m in models.items() if not v.startswith(("few", "all", *unmeasured))}
        variants = {variant: runtime for variant, (_step, runtime) in measured.items()}
        measure = _json(spec.evaluate.measure) | held(spec, "llama_cpp")
        measure |= {"variants": variants, "max_new_tokens": spec.evaluate.max_new_tokens}
        inputs = {f"model.{variant}": step for variant, (step, _runtime) in measured.items()} | {"data": "data"}
        self.add("measure", "evaluate.measure", measure, "latency and memory, fresh processes", inputs, seed=0)
        self._fidelity(models)
        evaluate = spec.evaluate.judging()
        params = {
            "name": spec.name, "version": spec.version, "task": _json(spec.task), "evaluate": evaluate, "shipped": shipped,
        }  # fmt: skip
        inputs = {"data": "data", "measurement": "measure", "fidelity": "fidelity"} | predictions
        inputs |= {
            f"training.{name}": name
            for name in ("teacher", "student", pruning.RECOVERED, "few", "all")
            if name in has and name != "teacher"
        }
        if spec.teacher is not None and spec.teacher.model is not None:
            inputs["training.teacher"] = "teacher"
        inputs |= {
            f"converted.{variant}": step for variant, (step, _runtime) in models.items() if variant != "teacher-torch"
        }
        inputs |= {name: name for name in ("synthetic", "logits") if name in has}
        self.add("report", "evaluate.report", params, "the comparison and the verdict", inputs, threads=1)
        bundle = {
            "name": spec.name,
            "version": spec.version,
            "licence": spec.licence,
            "task": _json(spec.task),
            "precision": precision,
            "max_new_tokens": spec.evaluate.max_new_tokens,
        }
        inputs = {"model": models[shipped][0], "report": "report", "data": "data"}
        self.add("bundle", "bundle.assemble", bundle, "the folder that ships", inputs, threads=1, seed=0)

    def _fidelity(self, models: Mapping[str, tuple[str, str]]) -> None:
        """`fidelity`: what each hop from the teacher to every form of the student keeps."""
        convert, teacher = self.spec.convert, self.spec.teacher
        guided = teacher is not None and teacher.instructed
        links, inputs = chain.chain(self.spec, self.steps, models, guided)
        params = {
            "links": [_json(link) for link in links], "prompts": convert.fidelity_prompts, "exact": convert.min_token_agreement,
            "rounded": convert.min_kept, "guided": _json(self.spec.task) if guided else None,
        }  # fmt: skip
        threads = self._teacher_threads() if "model.teacher" in inputs else 1
        self.add("fidelity", "evaluate.fidelity", params, "each form against the one before", inputs | {"data": "data"},
                 seed=self.spec.seed if guided else 0, threads=threads)  # fmt: skip
