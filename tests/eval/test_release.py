"""A release: what lies in it, that it cannot be built unsigned, and that it defends itself."""

import ast
import importlib.util
import json
import logging
import re
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from eval.core.artifacts import file_sha256, read_manifest
from eval.core.documents import Document
from eval.core.errors import UserError
from eval.core.gate_file import read_gate
from eval.engines import load_engine
from eval.release.__main__ import build_release, parse_variants, verify_signoffs
from eval.release.contract_file import read_contract
from eval.release.golden_answers import build_golden_answers, clear_choice, continue_prompt
from eval.score.tasks import greedy
from eval.signoff.keys import new_key, private_key, read_trusted
from eval.stats.crossed import linearise
from tests.eval import real_run
from tests.helpers import ROOT

DAY = date(2026, 6, 2)


@pytest.fixture(scope="module")
def loader(release):
    """The module that a user would import from the release."""
    spec = importlib.util.spec_from_file_location("load_release", release / "load_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(release, tmp_path):
    return shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))


def rewrite(release, name, change):
    """Changes release.json and its recorded hash with it, as a hand that knows how would."""
    index = json.loads((release / name).read_text())
    change(index)
    (release / name).write_text(json.dumps(index))
    manifest = json.loads((release / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = file_sha256(release / name)
    (release / "manifest.json").write_text(json.dumps(manifest))


def test_a_release_holds_what_it_promises(released_run, release):
    run = released_run
    contract = read_contract(release)
    shipped = contract.targets["cpu"]
    row = next(v for v in read_gate(run.path).variants if v.recipe == "small")
    assert shipped.artifact == read_manifest(release / "variants/small").hash == row.hashes.artifact["0"]
    assert contract.fallback == read_manifest(release / "fallback").hash
    gain = shipped.gain["validation"]
    assert gain.kept_share == row.kept_share
    assert contract.level == pytest.approx(1 - 2 * contract.alpha)
    for one in (gain.over_control, gain.over_fallback, shipped.gain["far"].over_control):
        assert (one.verdict == "PASS") == (one.measured.low >= one.floor), "shown is what decides"
    assert gain.over_control.floor == pytest.approx(0.5 * read_gate(run.path).teacher_gain.point)
    documents = real_run.documents("validation")
    size = np.array([d.bytes for d in documents])
    saved = np.subtract(real_run.bits("S0", "validation")[0], real_run.bits("S1", "validation")[0])
    assert gain.over_control.measured.point == pytest.approx(saved.sum() / size.sum())
    assert linearise(saved[None], size).mean() == pytest.approx(gain.over_control.measured.point)
    assert [cost.verdict for cost in shipped.fallback_cost] == ["PASS", "PASS"]
    assert contract.inputs.domains == {"code": 16, "prose": 8}
    assert (contract.owner, contract.expires, contract.inputs.context_tokens) == ("Team A", None, 64)
    lineage = json.loads((release / "lineage.json").read_text())
    variant = lineage["artifacts"]["variants/small/S1/s0"]
    assert variant["parents"]["student"] == lineage["artifacts"]["students/S1/s0"]["hash"]
    assert lineage["teachers"]["T1"] == lineage["artifacts"]["students/S1/s0"]["parents"]["teacher"]


def test_the_bill_of_materials_fits_the_published_schema_and_says_what_was_measured(release):
    import cyclonedx.schema._res as schemas
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    folder = Path(schemas.__path__[0])
    read = {name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in SCHEMAS}
    resources = [(f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", Resource.from_contents(schema))
                 for name, schema in read.items()]  # fmt: skip
    bom = json.loads((release / "bom.cdx.json").read_text())
    Draft7Validator(read[SCHEMAS[0]], registry=Registry().with_resources(resources)).validate(bom)
    contract = yaml.safe_load((release / "contract.yaml").read_text())
    parts = {part["bom-ref"]: part for part in bom["components"]}
    variant = parts["variant:cpu"]
    assert variant["hashes"][0]["content"] == contract["targets"]["cpu"]["artifact"]
    metrics = {
        (metric["type"], metric.get("slice")): metric
        for metric in variant["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    saving = contract["targets"]["cpu"]["gain"]["far"]["over_control"]["measured"]
    shown = metrics["bits_per_byte_saved_over_control", "far"]
    assert float(shown["value"]) == saving["point"]
    assert float(shown["confidenceInterval"]["lowerBound"]) == saving["low"]
    teacher, own = contract["targets"]["cpu"]["gain"]["far"]["teacher_gain"], metrics["own_share", "far"]
    for bound, end in (("lowerBound", "low"), ("upperBound", "high")):
        assert float(own["confidenceInterval"][bound]) == pytest.approx(saving[end] / teacher["point"])
    named = {one["name"]: one["value"] for one in variant["modelCard"]["properties"]}
    assert named["absorb:bounds"].startswith(
        "of quality over documents, two-sided, 90 %, that of own_share given"
    )
    assert "absorb:budget" not in named
    links = {one["ref"]: one["dependsOn"] for one in bom["dependencies"]}
    assert set(links) == {*parts, "release"}, "every part says what it was made from"
    assert links["variant:cpu"] == ["variants/small/S1/s0"]
    assert "students/S1/s0" in links["variants/small/S1/s0"]
    assert {"data", "T1"} <= set(links["students/S1/s0"])
    assert "T0" in links["students/S0/s0"]
    assert {"data", "method"} <= set(links["T1"])
    assert links["method"] == ["file:distill/methods/ensemble.py"]
    said = {one["name"]: one["value"] for one in parts["method"]["properties"]}
    assert "arXiv" in said["absorb:paper"]
    assert "times the memory" in said["absorb:limits"]  # of the method, which the student does without
    assert "technicalLimitations" not in variant["modelCard"]["considerations"]
    (file,) = parts["file:distill/methods/ensemble.py"]["hashes"]
    assert file["content"] == file_sha256(ROOT / "distill/methods/ensemble.py")
    assert "properties" not in bom["metadata"]["component"], "no recheck was promised"


SCHEMAS = ("bom-1.6", "spdx", "jsf-0.82")


def test_the_card_can_be_read_by_other_programs(release):
    card = ModelCard.load(release / "README.md")
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    contract = yaml.safe_load((release / "contract.yaml").read_text())
    gain = contract["targets"]["cpu"]["gain"]["far"]
    own = gain["over_control"]["measured"]["point"]
    assert results["far", "bits_per_byte"] == pytest.approx(gain["level"]["point"], abs=1e-6)
    assert results["far", "own_share"] == pytest.approx(own / gain["teacher_gain"]["point"], abs=1e-5)
    assert set(results) == {
        (split, name)
        for split in ("validation", "far")
        for name in (
            "bits_per_byte",
            "own_share",
            "bits_per_byte_saved_over_control",
            "bits_per_byte_saved_over_fallback",
        )
    }
    assert "Team A" in card.text
    assert "No recheck of it is promised." in card.text
    lineage = json.loads((release / "lineage.json").read_text())
    behind = [*lineage["files"].items(), ("students/S1/s0", lineage["artifacts"]["students/S1/s0"]["hash"])]
    for name, digest in [*behind, ("T1 with the method", lineage["teachers"]["T1"])]:
        assert re.search(rf"\| {name}.*\| `{digest}` \|", card.text), name
    assert "waiver" not in card.text.lower()
    gate = read_gate(release / "evidence")
    for sentence in (f"PASS: {gate.reason}", *(f"Note: {note}" for note in gate.notes)):
        assert f"- {sentence}\n" in card.text
    assert "each with its\n90 % interval" in card.text


def test_the_command_reports_what_it_built(released_run, release):
    output = (released_run.folder / "output").read_text()
    assert "cpu: small (torch), PASS, signed by Ada" in output
    assert file_sha256(release / "manifest.json") in output


def test_the_loader_serves_what_was_released(release, loader):
    model, info = loader.load_release(
        release, "cpu", sha256_of_manifest=file_sha256(release / "manifest.json")
    )
    assert (info.fallback, info.reason, info.verdict, info.folder) == (False, None, "PASS", "variants/small")
    assert info.budget_note is None
    engine = load_engine("torch", release / "variants/small")
    ids = model.encode("return self")
    row = engine.prefill(torch.tensor([ids]))[0][0]
    np.testing.assert_allclose(model.logits(ids)[-1], row.numpy(), atol=1e-5)
    generated = model.generate("return self", new_tokens=5)
    step_by_step = list(ids)
    for token in generated:
        assert int(model.logits(step_by_step)[-1].argmax()) == token
        step_by_step.append(token)
    with pytest.raises(loader.ReleaseError, match="no target 'tpu'; this release has cpu"):
        loader.load_release(release, "tpu")


def test_the_loader_imports_nothing_of_the_project(release):
    nodes = list(ast.walk(ast.parse((release / "load_release.py").read_text())))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert {"json", "transformers"} <= set(names)
    assert not {name.partition(".")[0] for name in names} & {"eval", "distill", "compress"}


SPOILED = {
    "weights": ("variants/small/model.safetensors", "variants/small/model.safetensors was changed"),
    "tokenizer": ("variants/small/tokenizer.json", "variants/small/tokenizer.json was changed"),
    "contract": ("contract.yaml", "contract.yaml was changed"),
    "sign-off": ("signoff/small@cpu.intoto.jsonl", "signoff/small@cpu.intoto.jsonl was changed"),
    "loader": ("load_release.py", "load_release.py was changed"),
}


@pytest.mark.parametrize(("name", "reason"), SPOILED.values(), ids=SPOILED)
def test_a_flipped_bit_serves_the_fallback_and_says_so(copy, loader, name, reason, caplog):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "load_release"):
        model, info = loader.load_release(copy, "cpu")
    assert (info.fallback, info.reason, info.folder) == (True, reason, "fallback")
    assert f"the fallback is served: {reason}" in caplog.text
    assert model.logits([0, 1]).shape == (2, 320)


@pytest.mark.parametrize("error", [PermissionError("denied"), OSError(5, "input/output error")])
def test_a_disk_that_fails_serves_the_fallback(copy, loader, monkeypatch, error):
    opened = Path.open

    def failing(path, *args, **given):
        if "variants" in path.parts:
            raise error
        return opened(path, *args, **given)

    monkeypatch.setattr(Path, "open", failing)
    info = loader.load_release(copy, "cpu")[1]
    assert info.fallback
    assert "variants/small" in info.reason
    assert "cannot be read" in info.reason


def test_an_error_of_any_kind_serves_the_fallback(copy, loader, monkeypatch):
    """tokenizers raises a bare Exception, safetensors one of its own."""
    original = loader.end_ids

    def failing(folder, tokenizer):
        if "variants" in folder.parts:
            raise Exception("data did not match any variant")
        return original(folder, tokenizer)

    monkeypatch.setattr(loader, "end_ids", failing)
    assert "data did not match any variant" in loader.load_release(copy, "cpu")[1].reason


def test_other_faults_serve_the_fallback(copy, loader, tmp_path):
    (copy / "variants/small/modeling.py").write_text("import os")
    assert "modeling.py is not part of the release" in loader.load_release(copy, "cpu")[1].reason
    (copy / "variants/small/modeling.py").unlink()

    def other_engine(index):
        index["targets"]["cpu"]["engine"] = "openvino"

    def expired(index):
        index["targets"]["cpu"]["expires"] = "2026-06-01"

    def other_answer(index):
        index["targets"]["cpu"]["golden_answers"][0]["expected"][-1] += 1

    def other_tokens(index):
        index["targets"]["cpu"]["golden_answers"][0]["ids"][1] += 1

    untouched = (copy / "release.json").read_text()
    for change, reason in [
        (other_engine, "openvino cannot run variants/small"),
        (expired, "its waiver expired on 2026-06-01"),
        (other_answer, "is continued with"),
        (other_tokens, "the tokenizer reads"),
    ]:
        (copy / "release.json").write_text(untouched)
        rewrite(copy, "release.json", change)
        _, info = loader.load_release(copy, "cpu", today=DAY)
        assert info.fallback
        assert reason in info.reason


def test_what_cannot_be_trusted_at_all_is_raised(copy, loader):
    pin = file_sha256(copy / "manifest.json")
    rewrite(copy, "release.json", lambda index: index.update(name="another"))
    assert loader.load_release(copy, "cpu")[1].release == "another"
    with pytest.raises(loader.ReleaseError, match="not the one that was released"):
        loader.load_release(copy, "cpu", sha256_of_manifest=pin)
    (copy / "release.json").write_text("{}")
    with pytest.raises(loader.ReleaseError, match=r"release\.json was changed"):
        loader.load_release(copy, "cpu")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(loader.ReleaseError, match="cannot be read"):
        loader.load_release(copy, "cpu")


def test_nothing_is_served_beside_a_file_that_nobody_listed(copy, loader):
    (copy / "fallback/adapter_config.json").write_text("{}")
    with pytest.raises(loader.ReleaseError, match=r"adapter_config\.json is not part of the release"):
        loader.load_release(copy, "cpu")
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(loader.ReleaseError, match=r"lists no release\.json"):
        loader.load_release(copy, "cpu")


def test_a_spoiled_fallback_is_raised_only_where_it_is_needed(copy, loader):
    (copy / "fallback/model.safetensors").write_bytes(b"gone")
    assert not loader.load_release(copy, "cpu")[1].fallback
    (copy / "variants/small/config.json").unlink()
    with pytest.raises(loader.ReleaseError, match=r"fallback/model\.safetensors was changed"):
        loader.load_release(copy, "cpu")


def test_nothing_is_released_unsigned_unmeasured_or_twice(released_run, release, tmp_path):
    run = released_run
    trusted = read_trusted([run.folder / "key.pub"])
    with pytest.raises(UserError, match="no sign-off in the run"):
        verify_signoffs(run.path, ["half"], trusted, DAY)
    new_key(tmp_path / "other")
    with pytest.raises(UserError, match="line 1: signed with the unknown key"):
        verify_signoffs(run.path, ["small"], read_trusted([tmp_path / "other.pub"]), DAY)
    other = run.path / "signoff/small-er@cpu.intoto.jsonl"
    other.write_text("of the recipe small-er")
    assert parse_variants(run.path, ["small"]) == {"cpu": "small"}
    other.unlink()
    with pytest.raises(UserError, match="two recipes for cpu"):
        parse_variants(run.path, ["cpu=small", "cpu=half"])
    case = verify_signoffs(run.path, ["cpu=small"], trusted, DAY)
    signer = private_key(run.folder / "key")
    with pytest.raises(UserError, match="is there already"):
        build_release(case, release, "Team A", DAY, signer)
    record = run.path / "records/cost/cpu/plain/B-s0.json"
    content = record.read_text()
    record.unlink()
    try:
        with pytest.raises(UserError, match=r"records/cost/cpu/plain/B-s0\.json"):
            verify_signoffs(run.path, ["small"], trusted, DAY)
        with pytest.raises(UserError, match="its cost was not measured"):
            build_release(case, tmp_path / "out", "Team A", DAY, signer)
    finally:
        record.write_text(content)
    assert not any(tmp_path.glob("*out*"))


def test_a_release_that_would_serve_its_fallback_is_not_built(released_run, tmp_path, monkeypatch):
    trusted = read_trusted([released_run.folder / "key.pub"])
    case = verify_signoffs(released_run.path, ["small"], trusted, DAY)

    def other(*args):
        return [c.model_copy(update={"expected": [1, 2, 3]}) for c in build_golden_answers(*args)]

    monkeypatch.setattr("eval.release.__main__.build_golden_answers", other)
    with pytest.raises(UserError, match="is continued with"):
        build_release(case, tmp_path / "out", "Team A", DAY, private_key(released_run.folder / "key"))
    assert not (tmp_path / "out").exists()


def test_golden_answers_are_sure_of_themselves(release):
    engine = load_engine("torch", release / "fallback")
    assert clear_choice(torch.tensor([0.0, 1.0, 10.0])) == 2
    assert clear_choice(torch.tensor([0.0, 9.95, 10.0])) is None, "closer than 1 % of the range"
    with pytest.raises(UserError, match="no prompt has a clear continuation"):
        build_golden_answers(engine, [Document("long", "code", "x y z " * 50)], 16)


def test_both_engines_of_the_loader_agree(loader, checkpoint, openvino_folder):
    ours, theirs = loader.TorchModel(checkpoint, "cpu", 0), loader.OpenVinoModel(openvino_folder, "cpu", 0)
    ids = ours.encode("import yield")
    np.testing.assert_allclose(theirs.logits(ids), ours.logits(ids), atol=1e-4)
    assert theirs.generate(ids, 6) == ours.generate(ids, 6)
    assert theirs.generate("import yield", 6) == ours.generate(ids, 6), "the state of one prompt is not kept"


def test_every_end_that_a_generation_config_lists_ends_a_text(loader, checkpoint, tmp_path):
    """In tasks, in golden answers and in the loader."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    ids = loader.TorchModel(checkpoint, "cpu", 0).encode("import yield")
    expected = greedy(load_engine("torch", checkpoint), [ids], 6)[0]
    end = expected[3]
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [0, end]}))
    engine, cut = load_engine("torch", copy), expected[: expected.index(end)]
    assert engine.end_ids == {0, end}
    assert greedy(engine, [ids], 6) == [cut]
    assert loader.TorchModel(copy, "cpu", 0).generate(ids, 6) == cut
    sure = continue_prompt(engine, ids)
    assert end not in sure
    assert expected[: len(sure)] == sure
