"""Top, random and silent examples of latents, against brute force one unpadded text at a time."""

import io
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from conftest import VOCAB, WIDTH, residuals
from mechreward.cli import app
from mechreward.errors import ConfigError, DataError, ModelMismatchError, PackError, SAEError
from mechreward.features import examples as module
from mechreward.features.examples import Example, FeatureExamples, Passage, collect, pocket_corpus, read_corpus
from mechreward.features.show import Shown, choose, page, pieces, print_feature, visible
from mechreward.readout import HookPoint, InputTransform, Nonlinearity, Readout, ReadoutBank
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.sampling import token_texts

POINT = HookPoint(1)
COLUMNS = 5


class Encoded:
    def __init__(self, input_ids):
        self.input_ids = input_ids


class Characters:
    """A tokenizer of single characters: pad 0, BOS 1, EOS 2, then the printable ones."""

    all_special_ids = (0, 1, 2)
    eos_token_id = 2

    def __init__(self, bos: bool = True):
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(c) - 29 for c in text]
        return Encoded([1, *ids] if add_special_tokens and self.bos else ids)

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        return "".join(chr(i + 29) if i > 2 else ("<pad>", "<bos>", "<eos>")[i] for i in ids)


def readout(always: bool = False) -> Readout:
    """Random JumpReLU columns; or columns that fire on every token."""
    g = torch.Generator().manual_seed(0)
    return Readout(
        name="latents",
        labels=tuple(f"feature_{i}" for i in range(COLUMNS)),
        hook_point=POINT,
        weight=0.3 * torch.randn(WIDTH, COLUMNS, generator=g) * (not always),
        bias=torch.ones(COLUMNS) if always else 0.3 * torch.randn(COLUMNS, generator=g),
        nonlinearity=Nonlinearity("jumprelu", {"threshold": torch.linspace(0, 3, COLUMNS) * (not always)}),
        transform=InputTransform(shift=0.1 * torch.randn(WIDTH, generator=g)),
    )


def by_hand(model, ids, columns) -> tuple[np.ndarray, np.ndarray]:
    """Activations ``[T, K]`` by the SAE's formula in float64, and how far each pre-activation is from flipping."""
    x = residuals(model, ids)[POINT.layer, POINT.site].double()
    z = (x - columns.transform.shift.double()) @ columns.weight.double() + columns.bias.double()
    threshold = columns.nonlinearity.parameters["threshold"].double()
    return (z * (z > threshold) * (z > 0)).numpy(), (z - threshold.clamp(min=0)).abs().numpy()


texts_of_characters = st.lists(
    st.text(st.characters(min_codepoint=32, max_codepoint=VOCAB + 28), min_size=0, max_size=30), min_size=1, max_size=12
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts_of_characters, st.integers(1, 7), st.integers(4, 12))
def test_examples_are_those_of_brute_force(gemma, texts, batch_size, context):
    tokenizer, columns = Characters(), readout()
    if not any(texts):
        with pytest.raises(DataError, match="no token"):
            collect(gemma, tokenizer, columns, texts, batch_size=batch_size)
        return
    found = collect(gemma, tokenizer, columns, texts, top=4, context=context, batch_size=batch_size)
    truth = {i: by_hand(gemma, [1, *tokenizer(text, False).input_ids], columns) for i, text in enumerate(texts) if text}
    for k, each in enumerate(found):
        acts = {i: values[1:, k] for i, (values, _) in truth.items()}  # without BOS
        margins = np.concatenate([margin[1:, k] for _, margin in truth.values()])
        close = int((margins < 1e-4).sum())
        assert each.tokens == sum(len(a) for a in acts.values()) == sum(map(len, texts))
        assert abs(each.fired - sum((a > 0).sum() for a in acts.values())) <= close
        assert each.counts.sum() == each.fired and each.texts == len(acts)
        if close:
            continue
        assert each.texts_fired == sum((a > 0).any() for a in acts.values())
        largest = sorted((a.max() for a in acts.values() if a.max() > 0), reverse=True)
        assert np.allclose([e.maximum for e in each.top], largest[:4], rtol=1e-4, atol=1e-5)
        for example in each.top + each.sample:
            mine = acts[example.text]
            ids = [1, *tokenizer(texts[example.text], False).input_ids]
            window = slice(example.start, example.start + len(example.tokens))
            assert list(example.token_ids) == ids[window]
            assert len(example.tokens) == min(context, len(ids))
            assert "".join(example.tokens) == tokenizer.decode(ids[window])
            assert example.start + example.peak - 1 == mine.argmax() or np.isclose(mine.max(), example.maximum)
            expected = np.concatenate([[0.0], mine])[window]
            assert np.allclose(example.activations, expected, rtol=1e-4, atol=1e-5)
            assert example.read.tolist() == [
                place > 0 for place in range(window.start, window.stop) if place < len(ids)
            ]
        for control in each.controls:
            place = slice(control.start - 1, control.start - 1 + len(control.tokens))
            assert (acts[control.text][place] == 0).all() and control.read.all()
            assert min(8, context) <= len(control.tokens) <= context


def same(a: Example, b: Example) -> bool:
    return (a.text, a.start, a.token_ids) == (b.text, b.start, b.token_ids)


def test_the_result_does_not_depend_on_the_batches(gemma, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 6)
    monkeypatch.setattr(module, "CONTROLS", 4)
    rng = np.random.default_rng(1)
    texts = ["".join(chr(c) for c in rng.integers(32, 125, size=n)) for n in rng.integers(1, 40, size=50)]
    one, many = (collect(gemma, Characters(), readout(), iter(texts), top=3, batch_size=b) for b in (1, 16))
    for a, b in zip(one, many, strict=True):
        assert (a.tokens, a.fired, a.texts_fired, a.counts.tolist()) == (
            b.tokens, b.fired, b.texts_fired, b.counts.tolist(),
        )  # fmt: skip
        assert 0 < len(a.sample) <= 6 and 0 < len(a.controls) <= 4 and len(a.top) == 3
        for kind in ("top", "sample", "controls"):
            assert all(map(same, getattr(a, kind), getattr(b, kind)))
    other = collect(gemma, Characters(), readout(), texts, top=3, seed=1)
    assert [e.text for e in other[0].sample] != [e.text for e in one[0].sample]
    assert all(map(same, other[0].top, one[0].top))


def test_special_tokens_padding_and_the_first_position_are_never_counted(gemma):
    always = readout(always=True)
    texts = ["a", "abcdefghijkl", "abc"]
    (found, *_) = collect(gemma, Characters(), always, texts)
    assert (found.tokens, found.fired, found.texts) == (16, 16, 3)
    (found, *_) = collect(gemma, Characters(bos=False), always, texts)
    assert (found.tokens, found.fired, found.texts) == (13, 13, 2)  # "a" has no token that may be counted
    ids = [[5, 6, 0, 7, 2], [8, 2, 9, 9, 9]]  # padding within, EOS, and what comes after EOS
    batch = RolloutBatch(["", ""], ["", ""], [[1, 4], [1]], ids, eos_token_ids=frozenset([2]))
    (found, *_) = collect(gemma, Characters(), always, [batch])
    assert (found.tokens, found.fired) == (4, 4)


def test_rollouts_are_read_behind_their_prompt(gemma):
    tokenizer, columns = Characters(), readout()
    prompt, completion = "What is it? ", "It is what it is."
    ids = tokenizer(completion, False).input_ids
    values, _ = by_hand(gemma, [1, *tokenizer(prompt, False).input_ids, *ids], columns)
    batch = RolloutBatch([prompt], [completion], [tokenizer(prompt).input_ids], [ids])
    for corpus in ([Passage(prompt, completion)], [Passage(prompt, "", ids)], [batch]):
        for k, found in enumerate(collect(gemma, tokenizer, columns, ["x", *corpus], context=100)):
            assert found.tokens == len(completion) + 1
            for example in found.top:
                if example.text == 1:
                    assert example.start == 0 and example.read.sum() == len(completion)
                    assert not example.read[: len(prompt) + 1].any()
                    assert np.allclose(example.activations[example.read], values[len(prompt) + 1 :, k], atol=1e-5)


def test_long_texts_are_cut_into_pieces(gemma):
    text = "abcdefghijklmnopqrstuvwxyz"
    cut = collect(gemma, Characters(), readout(), [text], length=10)
    pieces = collect(gemma, Characters(), readout(), [text[:10], text[10:20], text[20:]])
    for a, b in zip(cut, pieces, strict=True):
        assert (a.texts, a.fired, a.counts.tolist()) == (3, b.fired, b.counts.tolist())
        assert {e.text for e in a.top} <= {0}


def test_windows_lie_three_quarters_before_the_peak(gemma):
    rng = np.random.default_rng(2)
    text = "".join(chr(c) for c in rng.integers(32, 125, size=100))
    peaks = {
        e.start + e.peak: e for found in collect(gemma, Characters(), readout(), [text], context=8) for e in found.top
    }
    inside = [e for place, e in peaks.items() if 6 <= place <= 98]
    assert inside and all(e.peak == 6 and len(e.tokens) == 8 for e in inside)


def test_the_histogram_is_exact_whatever_comes_first():
    values = np.array([1.0, 2.0, 3.0, 4.0, 4.1, 0.0, -1.0, 0.125], np.float32)
    for order in (values, values[::-1]):
        latent = module._Latent(1)
        for value in order:
            latent.count(np.array([value]))
        assert latent.range == 8.0 and latent.fired == 6  # bins of 1/8
        assert np.flatnonzero(latent.counts).tolist() == [0, 7, 15, 23, 31, 32]
        assert latent.counts.sum() == 6


def test_tokens_keep_the_space_that_they_stand_for():
    class Dropping:
        """As Llama's: the space of a text's first token is lost, and a byte of a character is no text."""

        words = ("▁the", "▁cat", "s", "\u00e9-1", "\u00e9-2")

        def __call__(self, ids):
            text = "".join(self.words[i] for i in ids).replace("é-1é-2", "é")
            return re.sub("é-[12]", "\ufffd", text).replace("▁", " ").removeprefix(" ")

    assert token_texts(Dropping(), [0, 1, 2, 1]) == ["the", " cat", "s", " cat"]
    assert token_texts(Dropping(), [1, 3, 4]) == ["cat", "\ufffd", "\ufffd"]


def test_quantiles_cover_every_strength():
    examples = [made(["a"], [float(20 - i)], text=i) for i in range(20)]
    found = described(examples)
    groups = found.quantiles(groups=4, each=3)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    for place, group in enumerate(groups):
        texts = [e.text for e in group]
        assert texts == sorted(texts) and set(texts) <= set(range(5 * place, 5 * place + 5))
    assert found.quantiles(seed=1) != groups
    assert [len(group) for group in described(examples[:2]).quantiles()] == [1, 1, 0, 0]


def test_another_models_readout_is_refused(gemma):
    small = Readout("other", ("feature_0",), POINT, torch.zeros(7, 1), torch.zeros(1))
    with pytest.raises(ModelMismatchError, match="width 7"):
        collect(gemma, Characters(), small, ["text"])


def test_what_the_tokenizer_or_the_model_does_not_know(gemma):
    class NoTemplate(Characters):
        def apply_chat_template(self, *_, **__):
            raise ValueError("Cannot use chat template functions because tokenizer.chat_template is not set.")

    conversation = Passage([{"role": "user", "content": "p"}], "c")
    with pytest.raises(DataError, match=r"texts 2 to 2 .*chat_template is not set"):
        collect(gemma, NoTemplate(), readout(), ["a", conversation], batch_size=1)
    with pytest.raises(DataError, match=f"hold token 500, but the model knows {VOCAB} tokens"):
        collect(gemma, Characters(), readout(), [Passage("p", "c", [500])])


# Corpora.


def test_text_files(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n two \n\n", encoding="utf-8")
    assert list(read_corpus(file)) == ["one", " two "]
    file.write_text("\none\nmore of one\n \n\ntwo\n\n", encoding="utf-8")
    assert list(read_corpus(file)) == ["one\nmore of one", "two"]
    file.write_text("")
    assert list(read_corpus(file)) == []


def test_json_lines(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    rows = [
        {"text": "one", "prompt": None, "completion": None, "completion_ids": None},
        {"prompt": "p", "completion": "c", "label": True, "text": None, "completion_ids": None},
        {"prompt": [{"role": "user", "content": "p"}], "completion": "c", "completion_ids": [3, 4]},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(read_corpus(file)) == [
        "one",
        Passage("p", "c"),
        Passage([{"role": "user", "content": "p"}], "c", [3, 4]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"txt": "one"}', 'line 1 is .* needs a "text"'),
        ("a.jsonl", b'{"text": 3}', 'needs a "text"'),
        ("a.jsonl", b'{"text": "one"}\n{"text": null}', 'line 2 is .* needs a "text"'),
        ("a.jsonl", b'{"prompt": "p", "completion": null}', 'line 1 is .* needs a "text"'),
        ("a.jsonl", b"[1]", 'needs a "text"'),
        ("a.jsonl", b'{"prompt": "p", "completion": "c", "completion_ids": [-1]}', "token ids"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.csv", b"", "neither .txt nor .jsonl"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_bad_corpora_are_one_sentence(tmp_path, name, content, says):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_corpus(file))


def test_pockets_own_corpus():
    corpus = list(pocket_corpus(5))
    assert len(corpus) == 5 and all(p.prompt.endswith("Answer:") and "####" in p.completion for p in corpus)
    assert ["How many" in p.prompt for p in corpus] == [True, False, True, False, True]


# Shown to people.


def made(tokens, activations, read=None, text=0) -> Example:
    values = np.array(activations, np.float32)
    reads = np.ones(len(tokens), bool) if read is None else np.array(read, bool)
    return Example(tuple(tokens), tuple(range(3, 3 + len(tokens))), values, reads, int(values.argmax()), text, 0)


def described(examples, **changes) -> FeatureExamples:
    latent = module._Latent(1)
    for example in examples:
        latent.count(example.activations)
    fields = {
        "name": "feature_7", "top": examples, "sample": examples, "controls": [], "tokens": 1000,
        "fired": latent.fired, "texts": 50, "texts_fired": len(examples), "counts": latent.counts,
        "edges": np.linspace(0, latent.range, module.BINS + 1),
    }  # fmt: skip
    return FeatureExamples(**fields | changes)


HOSTILE = ["<script>alert(1)</script>", "[bold]", "\x1b[2J\x07", "\u202eevil", "</td>", "'\"&", "{{ 7 * 7 }}", " a\nb"]


def test_pieces_hold_the_text_and_the_shades():
    example = made(["p", " a", "b", " c", "d"], [0, 0, 1.0, 4.0, 0], [0, 1, 1, 1, 1])
    found = pieces(example, maximum=8.0)
    assert [p.text for p in found] == ["p", " a", "b", " c", "d"]
    assert [(p.kind, p.shade, p.peak) for p in found] == [
        ("unread", 0, False), ("silent", 0, False), ("fires", 0.125, False), ("fires", 0.5, True), ("silent", 0, False),
    ]  # fmt: skip


def test_the_page_is_self_contained_and_escapes():
    example = made(HOSTILE, [1.0, 2.0, 3.0, 0, 0, 0.5, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1])
    shown = Shown(7, described([example]), weight=-0.5, note="<b>note</b>")
    html = page("<title>", [("corpus", "<i>x</i>")], [shown, Shown(8, described([], fired=0))], 5)
    assert "<script" not in html and "<b>note" not in html and "<i>x" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "[bold]" in html and "{{ 7 * 7 }}" in html
    assert "\x1b" not in html and "\u202e" not in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import""", html)
    assert "default-src 'none'" in html
    assert 'style="--a:0.71" title="2"' in html  # .12 + .88 * 2 / 3
    assert "0.400 %" in html and "never fires in this corpus" in html
    assert "&lt;/td&gt;" in html and "↵b" in html


@pytest.mark.parametrize("colours", [True, False])
def test_the_terminal_shows_text_as_text(colours):
    example = made(HOSTILE, [1.0, 0.5, 3.0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1])
    out = io.StringIO()
    console = Console(width=200, force_terminal=colours, color_system="truecolor" if colours else None, file=out)
    print_feature(console, Shown(7, described([example]), 0.25, "[red]note"), 3)
    ansi = out.getvalue()
    text = re.sub(r"\x1b\[[0-9;]*m", "", ansi)
    assert "[bold]" in text and "[red]note" in text and "<script>" in text
    assert "0.300% of 1,000 tokens" in text and "+0.2500" in text
    assert "\x1b[2J" not in ansi and "\x07" not in ansi and "\u202e" not in ansi
    if colours:
        assert "48;2;234;88;12" in ansi  # the strongest shade
        assert "<<" not in text
    else:
        assert "\x1b" not in ansi
        assert "<<<script>alert(1)</script>>>[bold]<<\ufffd[2J\ufffd>>" in text  # above .3 of the largest


def test_visible():
    assert visible("a\r\nb\tc\x00\u2066") == "a↵b⇥c\ufffd\ufffd"


# Choosing, and the command line.


def test_choosing_latents():
    chosen = choose("pocket/reasoning_pack", None, [])
    assert len(chosen.ids) == 20 and chosen.weights[0] != 0 and chosen.readout.width == 20
    chosen = choose("pocket/reasoning_pack", None, [0, chosen.ids[3], 0])
    assert chosen.weights[0] is None and chosen.weights[1] is not None and chosen.readout.width == 2
    assert choose("pocket-res-canonical/layer_2/width_2k/topk", None, [5]).readout.labels == ("feature_5",)
    for arguments, error, says in [
        ((None, None, []), ConfigError, "one of the two"),
        (("pocket/reasoning_pack", "x/y", []), ConfigError, "one of the two"),
        (("pocket/reasonin_pack", None, [1]), ConfigError, "Did you mean 'pocket/reasoning_pack'"),
        ((None, "pocket-res-canonical/layer_2/width_2k/canonical", []), ConfigError, "--feature"),
        ((None, "pocket-res-canonical/layer_2/width_2k/canonical", [2048]), SAEError, "outside"),
        (("gemma-2-9b/reasoning_pack", None, []), PackError, "recipe"),
    ]:
        with pytest.raises(error, match=says):
            choose(*arguments)


def test_a_frozen_packs_own_columns(tmp_path):
    from mechreward.features.catalog import load_pack
    from mechreward.features.frozen import freeze

    card = str(freeze(load_pack("pocket/reasoning_pack"), tmp_path))
    whole, some = choose(card, None, []), choose("pocket/reasoning_pack", None, [])
    few = choose(card, None, [whole.ids[4], whole.ids[1]])
    x = torch.randn(50, some.readout.weight.shape[0], generator=torch.Generator().manual_seed(0)) * 10
    read = [torch.zeros(50, each.readout.width) for each in (few, some)]
    for each, values in zip((few, some), read, strict=True):
        ReadoutBank([each.readout]).encode(each.readout.hook_point, x, values)
    assert read[1].any()
    torch.testing.assert_close(read[0], read[1][:, [4, 1]])
    assert few.readout.labels == (f"feature_{whole.ids[4]}", f"feature_{whole.ids[1]}")
    with pytest.raises(PackError, match="carries no feature 0"):
        choose(card, None, [0])


def test_show_on_the_command_line(tmp_path):
    run, file = CliRunner(), tmp_path / "page.html"
    arguments = ["features", "show", "pocket/reasoning_pack", "--feature", "1905", "--texts", "30", "--html", str(file)]
    result = run.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "feature 1905" in result.output and "of 30 texts read by mechreward/pocket" in result.output
    assert "feature 1905" in file.read_text(encoding="utf-8")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"prompt": p.prompt, "completion": p.completion}) + "\n" for p in pocket_corpus(4))
    )
    sae = "pocket-res-canonical/layer_2/width_2k/canonical"
    result = run.invoke(app, ["features", "show", "--sae", sae, "--feature", "1905", "--corpus", str(corpus)])
    assert result.exit_code == 0 and "of 4 texts" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Name a pack"),
        (["pocket/reasoning_pack", "--corpus", "none.txt"], "cannot be read"),
        (["pocket/reasoning_pack", "--model", "no-such-model"], "no hub id or folder"),
        (["pocket/reasoning_pack", "--html", "no/such/folder/page.html"], "There is no folder"),
        (["pocket/reasoning_pack", "--neuronpedia"], "ids are not guessed"),
    ],
)
def test_what_goes_wrong_is_one_sentence(arguments, says):
    result = CliRunner().invoke(app, ["features", "show", *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split()) and "Traceback" not in result.output
