"""``metalearn adapt`` on a user's folders: files, console output and errors."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metalearn
from metalearn.commands.adapt.checks import check_adapt
from metalearn.commands.adapt.predictions import (
    Predictions,
    format_accuracy,
    print_predictions,
    wilson_interval,
    write_csv,
    write_picture,
)
from metalearn.commands.adapt.run import run_adapt
from metalearn.config.commands_schema import AdaptConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import ConfigError, DataError, RunError, RunExistsError
from metalearn.data.glyphs import make_glyphs
from metalearn.data.image_decoding import read_folder
from metalearn.inference.inversion import border_brightness
from tests.commands.process import command
from tests.training.run_folders import SINUSOID, untrained

GREEN, VERMILION, GREY, BLUE = (0, 158, 115), (213, 94, 0), (119, 119, 119), (0, 114, 178)
DRAWINGS = 255 - make_glyphs(classes=7, drawings=4, seed=9)[:, :, 0]  # dark ink on light paper
NAMES = ["=cmd()", "[b]", "c c", "d", "é", "f", "g"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("runs") / "maml")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """``support`` and ``query`` of five classes, in several sizes and modes; the first class has one image."""
    for c, name in enumerate(NAMES[:5]):
        for d in range(4):
            folder = tmp_path / ("support" if d < 2 else "query") / name
            folder.mkdir(parents=True, exist_ok=True)
            if c == 0 and d == 1:
                continue
            image = Image.fromarray(DRAWINGS[c, d].numpy()).resize((28 + 9 * d, 30 + c))
            mode, ending = [("L", "png"), ("RGB", "jpg"), ("1", "png"), ("RGBA", "png")][d]
            image.convert(mode).save(folder / f"{d}.{ending}")
    return tmp_path


def adapt(run: Path, folders: Path, *overrides: str) -> Path:
    """Run the command in this process; return the output folder."""
    keys = {"support": f"'{folders}/support'", "query": f"'{folders}/query'"}
    keys |= dict(one.split("=", 1) for one in overrides)
    arguments = [f"{name}={value}" for name, value in keys.items()]
    config = to_dataclass(compose("adapt", [f"run.dir='{run}'", "run.device=cpu", *arguments]), AdaptConfig)
    check_adapt(config)
    run_adapt(config, folders / "out")
    return folders / "out"


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def count(path: Path, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(Image.open(path).convert("RGB")) == np.array(colour)).all(axis=-1).sum())


def test_command_adapts_and_predicts_a_users_folder(run: Path, folders: Path) -> None:
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}
    keys = [f"run.dir={run}", "support=support", "query=query"]
    output = " ".join(command("adapt.py", *keys, "hydra.run.dir=out", cwd=folders).stdout.split())
    assert "black and white are exchanged (invert=auto)" in output
    assert "95% interval" in output
    assert "[b]/2.png" in output, "markup in a name is printed literally"
    out = folders / "out"
    assert {p.name for p in out.iterdir()} == {"adapted.safetensors", "predictions.csv", "predictions.png", "adapt.log"}
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}
    assert after == before, "the run's folder is unchanged"

    learner = metalearn.load(run, "cpu")
    support = read_folder(folders / "support", size=28, channels=1)
    query = read_folder(folders / "query", size=28, channels=1)
    assert support.labels is not None
    learner.adapt(255 - support.images, support.labels)
    probabilities = learner.predict_proba(255 - query.images)
    written = rows(out)
    columns = [f"p({name})" for name in sorted(NAMES[:5])]
    assert list(written[0]) == ["file", "predicted", "probability", "true", *columns]
    files = [path.relative_to(folders / "query").as_posix() for path in query.paths]
    assert [row["file"].lstrip("'") for row in written] == files
    assert [row["predicted"].lstrip("'") for row in written] == learner.predict(255 - query.images)
    assert [row["true"].lstrip("'") for row in written] == [p.parent.name for p in query.paths]
    for row, expected in zip(written, probabilities, strict=True):
        assert [float(row[f"p({name})"]) for name in learner.classes_] == pytest.approx(expected.tolist(), abs=1e-5)
        assert float(row["probability"]) == pytest.approx(expected.max().item(), abs=1e-5)
    assert any(row["file"].startswith("'=cmd()/") for row in written)
    right = sum(row["predicted"] == row["true"] for row in written)
    assert f"({right} of 10; 95% interval" in output
    assert (count(out / "predictions.png", GREEN) > 300 * right) == (right > 0)
    assert count(out / "predictions.png", VERMILION) > 300 * (10 - right)

    assert "already holds a run" in command("adapt.py", *keys, f"hydra.run.dir={run}", cwd=folders, code=2).stderr


def test_flat_query_folder_is_predicted_without_accuracy(
    run: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapt(run, folders, f"query='{folders}/query/d'")
    assert [(row["file"], row["true"]) for row in rows(out)] == [("2.png", ""), ("3.png", "")]
    assert count(out / "predictions.png", GREY) > 600
    assert count(out / "predictions.png", GREEN) == count(out / "predictions.png", VERMILION) == 0
    output = capsys.readouterr().out
    assert "accuracy" not in output
    assert "2 images" in output


def test_saved_weights_replace_the_support_set(run: Path, folders: Path) -> None:
    first = rows(adapt(run, folders, f"save='{folders}/kept/mine'"))
    assert not (folders / "out" / "adapted.safetensors").exists()
    (folders / "out").rename(folders / "before")
    out = adapt(run, folders, "support=null", f"weights='{folders}/kept/mine'")
    assert rows(out) == first
    assert not (out / "adapted.safetensors").exists()


def test_weights_are_saved_without_a_query_folder(run: Path, folders: Path) -> None:
    out = adapt(run, folders, "query=null", "steps=1")
    assert [p.name for p in out.iterdir()] == ["adapted.safetensors"]
    assert metalearn.load(run, "cpu").restore(out / "adapted.safetensors").steps_ == 1


@pytest.mark.parametrize(("invert", "light", "inverted"), [
    ("auto", True, True), ("auto", False, False), ("true", False, True), ("false", True, False),
])  # fmt: skip
def test_images_are_inverted_when_borders_are_light(
    invert: str, light: bool, inverted: bool, run: Path, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folders.rglob("*.*"):
        image = Image.open(path).convert("L")
        path.unlink()
        (image if light else image.point(lambda v: 255 - v)).save(path.with_suffix(".png"))
    with caplog.at_level("INFO"):
        out = adapt(run, folders, f"invert={invert}")
    assert ("invert=auto" in caplog.text) == (invert == "auto")
    assert ("exchanged" in caplog.text) == (invert == "auto" and inverted)
    learner = metalearn.load(run, "cpu").restore(out / "adapted.safetensors")
    assert (border_brightness((learner._state().support_x * 255).byte()).mean() < 0.5) == (light == inverted)
    query = read_folder(folders / "query", size=28, channels=1).images
    expected = learner.predict_proba(255 - query if inverted else query).amax(dim=1)
    assert [float(row["probability"]) for row in rows(out)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_warning_names_images_with_other_borders(run: Path, folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(folders / "support" / "d" / "dark.png")
    adapt(run, folders)
    assert "1 image of 10 with dark borders, unlike the others; all are treated the same (invert=true)" in caplog.text


def test_border_brightness_of_glyphs_is_dark() -> None:
    images = make_glyphs(classes=50)
    assert border_brightness(images.flatten(0, 1)).mean() < 0.2
    frame = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    frame[1, :, 0] = 255
    assert border_brightness(frame).tolist() == [0.0, pytest.approx(4 / 12)]


def test_error_names_unreadable_file(run: Path, folders: Path) -> None:
    (folders / "support" / "d" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"(?s)d/broken\.png: .*pass them over with on_unreadable=skip"):
        adapt(run, folders)
    assert len(rows(adapt(run, folders, "on_unreadable=skip"))) == 10
    for path in (folders / "support" / "d").glob("[01].*"):
        path.write_bytes(b"")
    (folders / "out").rename(folders / "before")
    with pytest.raises(DataError, match=r"no readable image in d\. Add images"):
        adapt(run, folders, "on_unreadable=skip")


def test_adapt_raises_when_folders_are_invalid(run: Path, folders: Path) -> None:
    (folders / "query" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"query holds no image in zebra"):
        adapt(run, folders)
    Image.new("L", (9, 9)).save(folders / "query" / "zebra" / "a.png")
    with pytest.raises(DataError, match=r"classes that are not among the 5 of the support set: zebra"):
        adapt(run, folders)
    (folders / "support" / "empty").mkdir()
    with pytest.raises(DataError, match=r"support holds no image in empty"):
        adapt(run, folders)
    with pytest.raises(DataError, match=r"^support=.*typo: there is no such folder"):
        adapt(run, folders, f"support='{folders}/typo'")
    with pytest.raises(DataError, match=r"holds 2 images but no folders of classes"):
        adapt(run, folders, f"support='{folders}/support/d'")
    (folders / "one" / "d").mkdir(parents=True)
    Image.new("L", (9, 9)).save(folders / "one" / "d" / "a.png")
    with pytest.raises(DataError, match=r"one holds one class \(d\); there is nothing to tell apart"):
        adapt(run, folders, f"support='{folders}/one'")
    assert not (folders / "out").exists()


def test_adapt_raises_when_query_class_is_not_in_weights(run: Path, folders: Path) -> None:
    adapt(run, folders, "query=null", f"save='{folders}/mine'")
    (folders / "query" / "d").rename(folders / "query" / "zebra")
    with pytest.raises(DataError, match=r"not among the 5 of the support set: zebra"):
        adapt(run, folders, "support=null", f"weights='{folders}/mine'")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["support=null"], r"support is required: a folder with one folder a class \(or weights=FILE"),
        (["weights=mine"], r"give one; weights are adapted already"),
        (["weights=mine"], r"weights=mine: there is no such file"),
        (["support=null", "weights=mine", "steps=1"], r"weights=mine with steps=1: no steps are taken"),
        (["support=null", "weights=mine", "query=null"], r"weights=mine without query: there is nothing to do"),
        (["save=/"], r"save=/: this exists, and is not overwritten"),
        (["invert=maybe"], r"invert=maybe: must be one of false, true, auto"),
        (["steps=-1"], r"steps=-1: must be a whole number, at least 0, or null"),
        (["on_unreadable=stopp"], r"on_unreadable=stopp: must be one of stop, skip"),
        (["run.dir=typo"], r"run\.dir=typo: there is no such folder of a run, and no such model"),
        (["run.device=gpu"], r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_adapt_raises_when_keys_conflict(overrides: list[str], message: str, run: Path, folders: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(run, folders, *overrides)


def test_adapt_raises_when_run_cannot_be_adapted(run: Path, folders: Path) -> None:
    with pytest.raises(ConfigError, match=r"this run predicts numbers \(data=sinusoid\), not classes"):
        adapt(untrained(folders / "sinusoid", base=SINUSOID), folders)
    bare = folders / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(RunError, match=r"best\.pt does not exist"):
        adapt(bare, folders)
    (folders / "support" / "d").rename(folders / "rest")
    (folders / "query" / "d").rename(folders / "others")
    with pytest.raises(RunError, match=r"4 classes, .*algorithm=meta_sgd has learned a step size"):
        adapt(untrained(folders / "meta_sgd", "algorithm=meta_sgd"), folders)
    assert not (folders / "out").exists()
    assert len(rows(adapt(run, folders))) == 8, "maml supports another number of classes"


def test_adapt_raises_when_results_exist(run: Path, folders: Path) -> None:
    (folders / "out").mkdir()
    for name in ("adapted.safetensors", "predictions.csv", "predictions.png"):
        (folders / "out" / name).write_text("mine")
        with pytest.raises(RunExistsError, match=f"its {name}"):
            adapt(run, folders)
        assert (folders / "out" / name).read_text() == "mine"
        (folders / "out" / name).unlink()


def predictions(images: int, *, truth: bool = True) -> Predictions:
    names = [f"{i:03}.png" for i in range(images)]
    return Predictions(names, torch.eye(2).repeat(images, 1)[:images], ["a", "b"], [0] * images if truth else None)


def test_table_has_at_most_30_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_predictions(predictions(100))
    output = " ".join(capsys.readouterr().out.split())
    assert "the first 30; 70 more are in predictions.csv" in output
    assert "029.png" in output
    assert "030.png" not in output


def test_markup_in_a_name_is_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_predictions(Predictions(["x[/y].png"], torch.eye(2)[:1], ["[b]", ":ok:"], [1]))
    output = capsys.readouterr().out
    assert "x[/y].png" in output
    assert "[b]" in output
    assert ":ok:" in output


def test_csv_escapes_formulas(tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-1", "@x", "\tx", "a,b\n=c", 'q"', "safe"]
    one = Predictions(names, torch.eye(2).repeat(4, 1), ["=a", "-b"], [0, 1] * 4)
    write_csv(one, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    assert [row[0] for row in found[1:]] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "a,b\n'=c", 'q"', "safe"]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for row in found for cell in row)
    assert found[1][1:4] == ["'=a", "1.000000", "'=a"]


def test_picture_shows_what_was_learned_from(tmp_path: Path) -> None:
    learned = torch.full((20, 1, 8, 8), 55, dtype=torch.uint8), ["a"] * 20
    write_picture(predictions(3), torch.zeros(3, 1, 8, 8, dtype=torch.uint8), tmp_path / "p.png", learned_from=learned)
    drawn = count(tmp_path / "p.png", (55, 55, 55)) // (78 * 78)
    assert drawn == 16, "two rows of eight, inside of their frames"
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert (picture[:250] == np.array(BLUE)).all(axis=-1).any(), "framed above the predictions"
    assert not (picture[:250] == np.array(GREEN)).all(axis=-1).any()


def test_folder_of_folders_of_classes_is_refused(run: Path, folders: Path) -> None:
    with pytest.raises(DataError, match=r"holds folders of folders \(query holds .*Name the folder .*/query\."):
        adapt(run, folders.parent, f"support='{folders}'")
    learner = metalearn.load(run, "cpu")
    with pytest.raises(DataError, match="holds folders of folders"):
        learner.read(folders)
    for name in NAMES[:5]:  # CLASS/images/1.png is one class
        (folders / "support" / name).rename(folders / "moved")
        (folders / "support" / name).mkdir()
        (folders / "moved").rename(folders / "support" / name / "images")
    assert learner.read(folders / "support").classes == sorted(NAMES[:5])


def test_labels_of_a_folder_are_predicted(run: Path, folders: Path) -> None:
    learner = metalearn.load(run, "cpu")
    images, labels, classes, _ = learner.read(folders / "support")
    assert labels is not None
    assert set(learner.adapt(images, labels).predict(images)) <= set(classes) == set(NAMES[:5])


@pytest.mark.parametrize(("images", "drawn"), [(3, 3), (64, 64), (200, 64)])
def test_picture_has_at_most_64_images(images: int, drawn: int, tmp_path: Path) -> None:
    pixels = torch.zeros(images, 3, 8, 8, dtype=torch.uint8)
    pixels[-images // 10 :] = 77
    write_picture(predictions(images), pixels, tmp_path / "p.png")
    frame = 4 * 84 * 3 - 4 * 9
    green, vermilion = (count(tmp_path / "p.png", colour) for colour in (GREEN, VERMILION))
    assert frame * drawn <= green + vermilion < (frame + 300) * drawn, "frames, and the text below them"
    assert min(green, vermilion) >= frame * (drawn // 4), "every other image is predicted correctly"
    assert count(tmp_path / "p.png", (77, 77, 77)) > 6000, "the last images are drawn"


def test_long_class_name_is_truncated(tmp_path: Path) -> None:
    one = Predictions(["a"], torch.ones(1, 1), ["very long " * 20], None)
    write_picture(one, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert (picture[:, 10 + 84 :][26:] == 255).all(), "nothing to the right of the cell"


def test_wilson_interval_equals_formula() -> None:
    # p + z^2 / 2n -+ ...: for none of n right the lower end is 0 and the upper z^2 / (n + z^2), 3.8416 / 13.8416
    assert wilson_interval(0, 10) == pytest.approx((0, 3.8416 / 13.8416), abs=1e-12)
    low, high = wilson_interval(5, 10)
    assert (low + high) / 2 == pytest.approx(0.5)
    # the ends solve (x - p)^2 = z^2 x (1 - x) / n
    for end in wilson_interval(8, 10):
        assert (end - 0.8) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 10)
    assert format_accuracy([True] * 8 + [False] * 2) == "80.0% (8 of 10; 95% interval 49.0% to 94.3%)"
