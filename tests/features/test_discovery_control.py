"""A positive control: columns that are known to read a behaviour, put among pocket's own latents, must come out on top.

The columns are probe directions, trained on other questions, for the arithmetic step and for the hedge. The hedge is
one fixed sentence, which a dozen of pocket's own latents tell without an error: there, the probe must be among the
first ten of 2,050; for the step it must be the first.
"""

import numpy as np
import pytest
import torch
from planting import OWN, extended_sae, pocket, sampled
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mechreward.features.discover import Search, discover
from mechreward.readout import HookPoint, residual
from mechreward.rollout.source import pooled, read_in_pieces


def shows(behaviour, rollouts):
    """Labels that can be read off the text."""
    texts = rollouts.batch.texts
    return np.array(["=" in t if behaviour == "step" else "not sure" in t for t in texts])


def rollouts_with(behaviour, split):
    kind = "reasoning" if behaviour == "step" else "retrieval"
    found = sampled(split, 150, 2, kind)
    return found, shows(behaviour, found)


def probe(behaviour):
    """A direction ``[d]``, and a bias that keeps it above 0 on nearly every token, where a ReLU changes nothing."""
    model, _ = pocket()
    rollouts, labels = rollouts_with(behaviour, "train")
    stream = residual(HookPoint(2), model.config.hidden_size)
    x = torch.cat(list(pooled(model, rollouts.batch, [stream])))
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(x.double().numpy(), labels)
    weight = torch.tensor(fitted.coef_[0]).float()
    weight /= weight.norm()
    tokens = torch.cat([r.values[r.mask] for _, (r,) in read_in_pieces(model, rollouts.batch, [stream])]) @ weight
    return weight, -tokens.quantile(0.001)


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    columns = [probe("step"), probe("hedge")]
    weights, biases = torch.stack([w for w, _ in columns]), torch.stack([b for _, b in columns])
    return extended_sae(tmp_path_factory.mktemp("control") / "sae", weights, biases, torch.zeros(2))


@pytest.mark.parametrize("behaviour", ["step", "hedge"])
@pytest.mark.slow
def test_what_is_known_to_read_the_behaviour_is_ranked_first_on_every_seed(sae, behaviour):
    rollouts, labels = rollouts_with(behaviour, "discovery")
    planted = OWN + (behaviour == "hedge")
    for seed in range(5):
        questions = np.random.default_rng(seed).permutation(np.unique(rollouts.groups))[:75]
        rows = np.flatnonzero(np.isin(rollouts.groups, questions))
        part = rollouts.take(rows)
        part.labels[:] = labels[rows]
        found = discover(*pocket(), part, [sae], "control", behaviour, Search(permutations=20, seed=seed))
        order = np.argsort(-np.abs(found.scan.effect), kind="stable").tolist()
        assert order.index(planted) < (1 if behaviour == "step" else 10), seed
        assert next(f.weight for f in found.pack.features if f.id == planted) > 0
        assert found.scan.adjusted_p[planted] == 1 / 21
