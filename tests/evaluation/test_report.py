import dataclasses
import json
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.grid import save_sample_grid
from lightning_dp.evaluation.report import RunCard, metrics_table, read_run_card, write_run_card

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, links and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.sources, self.styles = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href", "action", "data") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def card():
    return RunCard(
        title="DataLens <img src=x> & friends",
        run_id="run-7",
        created="2026-01-02T03:04:05+00:00",
        claim={
            "level": "PROVED",
            "epsilon": 9.98765,
            "delta": 1e-5,
            "relation": "replace_one",
            "unit": "record",
            "accountant": "gaussian",
            "sampler": "full batch, executed",
            "num_releases": 400,
            "mechanism": "TopAgg",
            "assumptions": ["Shards are fixed by <position>."],
            "not_covered": ["Tuning on the same records."],
            "warnings": ["delta is above 1/N."],
        },
        claim_statement="(9.9877, 1e-05)-differentially private per record.",
        budget={"target_epsilon": 10.0, "target_delta": 1e-5},
        mechanism={"name": "TopAgg", "l2_sensitivity": 32.0, "k": 64},
        sampler={"scheme": "full", "executed": True},
        seed_policy="Noise from the operating system.",
        data={"name": "MNIST", "num_records": 60000, "image_shape": [1, 28, 28]},
        model={"generator_parameters": 123456},
        evaluation={
            "fid": 38.214,
            "fid_extractor": "digits-fashion-cnn",
            "kid": 1.5,
            "precision": 0.71,
            "recall": 0.22,
            "accuracy": {"logistic": 0.81, "cnn": 0.8812},
            "num_samples": 10000,
            "num_reference": 10000,
            "num_test": 10000,
            "protocol_hash": "bdc0ef579afb",
            "wall_time_s": 31.2,
            "warnings": ["No synthetic image has label 3."],
        },
        epsilon_curve=((1, 0.5), (400, 9.98765)),
        cost={"total_time_s": 754.0, "train_time_s": 700.0, "peak_memory_mb": 1800},
        versions={"torch": "2.13.0"},
        config={"trainer": {"max_steps": 400}, "note": "</pre><script>alert(1)</script>"},
        sample_grid="samples.png",
    )


@pytest.fixture
def grid(tmp_path):
    return save_sample_grid(tmp_path / "samples.png", torch.rand(4, 1, 4, 4), torch.arange(4))


def without_epsilon(card, level="CONDITIONAL"):
    claim = {**card.claim, "level": level, "epsilon": None}
    statement = "No epsilon is claimed: the encoder is assumed public."
    return dataclasses.replace(card, claim=claim, claim_statement=statement)


def table_text(card):
    output = StringIO()
    Console(width=120, file=output).print(metrics_table(card))
    return output.getvalue()


def test_json_round_trip(card, grid, tmp_path):
    json_path, html_path = write_run_card(tmp_path, card)
    assert (json_path.name, html_path.name) == ("run_card.json", "run_card.html")
    assert read_run_card(tmp_path).to_dict() == card.to_dict()
    assert read_run_card(json_path) == RunCard.from_dict(json.loads(json_path.read_text()))
    write_run_card(tmp_path, card.to_dict())
    assert read_run_card(tmp_path).to_dict() == card.to_dict()


def test_page_is_whole_escaped_and_self_contained(card, grid, tmp_path):
    _, path = write_run_card(tmp_path, card)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2  # grid, epsilon
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)


def test_page_states_the_claim_in_full(card, grid, tmp_path):
    words = Page(write_run_card(tmp_path, card)[1].read_text()).words
    for expected in (
        card.title,
        card.claim_statement,
        "PROVED",
        "9.9877",
        "1e-05",
        "replace_one",
        "record",
        *card.claim["assumptions"],
        *card.claim["not_covered"],
        *card.claim["warnings"],
        "full batch, executed",
        "Noise from the operating system.",
        "FID (digits-fashion-cnn)",
        "bdc0ef579afb",
        "No synthetic image has label 3.",
        "60,000",
        "12 min 34 s",
        "</pre><script>alert(1)</script>",
    ):
        assert expected in words


@pytest.mark.parametrize("level", ["CONDITIONAL", "UNVERIFIED", "NONPRIVATE"])
def test_without_an_epsilon_the_statement_stands_instead(card, grid, tmp_path, level):
    card = without_epsilon(card, level)
    page = Page(write_run_card(tmp_path, card)[1].read_text())
    assert card.claim_statement in page.words
    assert level in page.words
    assert "epsilon at delta" not in page.words
    assert page.tags.count("img") == 1  # no epsilon curve
    table = table_text(card)
    assert card.claim_statement in table
    assert level in table
    assert "9.98" not in table


@pytest.mark.parametrize(
    ("level", "epsilon"),
    [("CONDITIONAL", 1.0), ("NONPRIVATE", float("inf")), ("PROVED", None), ("PROVED", float("inf")), ("PROVED", "1")],
)
def test_an_epsilon_is_taken_from_proved_claims_only(card, level, epsilon):
    with pytest.raises(ConfigurationError, match="finite epsilon for level PROVED and none for any other"):
        dataclasses.replace(card, claim={**card.claim, "level": level, "epsilon": epsilon})


@pytest.mark.parametrize("place", ["cost", "evaluation", "model"])
def test_raw_values_are_refused_anywhere(card, place):
    spoilt = {**getattr(card, place), "raw/loss": 2.0}
    with pytest.raises(ConfigurationError, match="raw/loss"):
        dataclasses.replace(card, **{place: spoilt})


def test_table_ends_a_run(card):
    table = table_text(card)
    for expected in ("DataLens <img src=x>", "9.9877", "1e-05", "replace_one", "PROVED", "38.21", "digits-fashion-cnn"):
        assert expected in table
    for expected in ("0.71 / 0.22", "accuracy, cnn", "0.8812", "12 min 34 s", "delta is above 1/N."):
        assert expected in table


def test_markup_in_a_title_is_plain_text(card):
    assert "[bold]x[/nope]" in table_text(dataclasses.replace(card, title="[bold]x[/nope]"))


def test_bare_card_has_a_page_and_a_table(card, tmp_path):
    bare = RunCard(
        title="bare",
        run_id="0",
        created="now",
        claim=without_epsilon(card).claim,
        claim_statement="Nothing is claimed.",
    )
    Page(write_run_card(tmp_path / "made", bare)[1].read_text())
    assert "Nothing is claimed." in table_text(bare)


def test_infinities_are_valid_json(card, tmp_path):
    card = dataclasses.replace(card, config={"limit": float("inf")}, sample_grid=None)
    written = json.loads(write_run_card(tmp_path, card)[0].read_text(), parse_constant=pytest.fail)
    assert written["config"]["limit"] == "inf"


def test_wrong_cards_are_refused(card, tmp_path):
    values = card.to_dict()
    with pytest.raises(ConfigurationError, match=r"got \['titel'\]"):
        RunCard.from_dict({**values, "titel": "x"})
    with pytest.raises(ConfigurationError, match=r"none of \['claim'\]"):
        RunCard.from_dict({name: value for name, value in values.items() if name != "claim"})
    with pytest.raises(ConfigurationError, match="format=2"):
        RunCard.from_dict({**values, "format": 2})
    with pytest.raises(ConfigurationError, match=r"none of \['unit'\]"):
        dataclasses.replace(card, claim={k: v for k, v in card.claim.items() if k != "unit"})
    with pytest.raises(ConfigurationError, match="claim level out of"):
        dataclasses.replace(card, claim={**card.claim, "level": "SURE"})
    with pytest.raises(ConfigurationError, match="inside the run folder"):
        dataclasses.replace(card, sample_grid="../secret.png")
    with pytest.raises(ConfigurationError, match="Expected a run card, got"):
        read_run_card(tmp_path)


def test_missing_grid_and_unwritable_folder(card, tmp_path):
    with pytest.raises(ConfigurationError, match=r"run folder with samples\.png"):
        write_run_card(tmp_path, card)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="writable run folder"):
        write_run_card(tmp_path / "file" / "run", dataclasses.replace(card, sample_grid=None))
