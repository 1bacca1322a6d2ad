"""The memory against searches by hand in float64; its own document is never found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.methods.memory import find_among_all
from eval.core.documents import collate, join_rows
from eval.core.errors import UserError
from eval.engines.torch import load_model
from tests.distill.method_helpers import answer, make


@torch.no_grad()
def states(model, row):
    """[T, D] last hidden states and [T, V] probabilities of a row, float64."""
    out = model(torch.tensor([row.tokens]), output_hidden_states=True)
    return out.hidden_states[-1][0].double().numpy(), out.logits[0].double().softmax(-1).numpy()


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("total", [50, 1000])
def test_the_nearest_keys_are_those_of_a_search_by_hand(total, count):
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, 8, generator=generator) for n in (total, 300))
    places, own = (torch.randint(4, (n,), generator=generator) for n in (total, 300))
    own[:9] = -1  # of no document of the datastore
    distances, entries = find_among_all(keys, places)(queries, own, count)
    for i, query in enumerate(queries.double()):
        by_hand = ((keys.double() - query) ** 2).sum(-1).masked_fill(places == own[i], torch.inf)
        order = by_hand.argsort()[:count]
        there = by_hand[order] < torch.inf
        assert entries[i][there].tolist() == order[there].tolist()
        torch.testing.assert_close(distances[i].double(), by_hand[order], atol=1e-5, rtol=1e-5)


def test_a_distribution_is_the_mixture_of_the_paper_over_other_documents(context, rows):
    """(1 - l) p + l sum of exp(-d^2 / t) over the k nearest: Khandelwal et al. 2020, eq. 2 and 3."""
    share, count, temperature = 0.4, 6, 3.0
    method = make("memory", share=share, neighbours=count, temperature=temperature)
    method.fit(context)
    teacher, row = load_model(context.bases[0]), rows[2]
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, collate([row], 0))[0].double().exp().numpy()
        strange = answer(method, teacher, collate([replace(row, document="new")], 0))[0].exp()
    entries = [
        (state, token)
        for other in rows
        if other.document != row.document
        for state, token in zip(states(teacher, other)[0], other.tokens[1:], strict=False)
    ]
    keys, values = np.stack([state for state, _ in entries]), np.array([token for _, token in entries])
    hidden, plain = states(teacher, row)
    compared = 0
    for place in range(len(row.tokens)):
        distances = ((keys - hidden[place]) ** 2).sum(-1)
        if np.diff(np.sort(distances)[count - 1 : count + 1]) < 1e-4:
            continue  # which of two equal moments is found is not defined
        compared += 1
        found = distances.argsort(kind="stable")[:count]
        weights = np.exp(-(distances[found] - distances[found].min()) / temperature)
        wanted = (1 - share) * plain[place]
        np.add.at(wanted, values[found], share * weights / weights.sum())
        np.testing.assert_allclose(said[place], wanted, atol=1e-4)
    assert compared > 15
    last = len(row.tokens) - 2  # read again in its own document, the token that follows is certain
    assert strange[last, row.tokens[-1]] > share * 0.5 > said[last, row.tokens[-1]]


def test_the_cache_is_that_of_the_paper(context, rows):
    """Grave et al. 2017, eq. 3: what followed h_i counts by exp(theta h_t h_i)."""
    share, flatness = 0.3, 0.05
    method = make("memory", share=0, cache_share=share, flatness=flatness)
    assert not method.fits
    teacher, row = load_model(context.bases[0]), rows[2]
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, collate([row], 0))[0].double().exp().numpy()
    flat = method.control()
    with torch.no_grad(), flat.attached(teacher, context):
        counted = answer(flat, teacher, collate([row], 0))[0].double().exp().numpy()
    hidden, plain = states(teacher, row)
    np.testing.assert_allclose(said[0], plain[0], atol=1e-6)
    for place in range(1, len(row.tokens)):
        scores = flatness * hidden[:place] @ hidden[place]
        weights = np.exp(scores - scores.max())
        for weight, found in ((weights / weights.sum(), said), (np.full(place, 1 / place), counted)):
            wanted = (1 - share) * plain[place]
            np.add.at(wanted, row.tokens[1 : place + 1], share * weight)
            np.testing.assert_allclose(found[place], wanted, atol=1e-5)


def test_the_control_has_the_same_keys_and_the_same_values_elsewhere(context, rows, tmp_path):
    method = make("memory")
    method.fit(context)
    other = replace(context, folder=tmp_path)
    method.control().fit(other)
    keys, values = (np.load(context.folder / name) for name in ("keys.npy", "values.npy"))
    assert np.array_equal(np.load(tmp_path / "keys.npy"), keys)
    assert np.array_equal(np.sort(np.load(tmp_path / "values.npy")), np.sort(values))
    assert not np.array_equal(np.load(tmp_path / "values.npy"), values)
    assert len(values) == sum(row.predicted for row in rows)


def test_packed_rows_and_shares_that_leave_nothing_are_refused(context, rows):
    packed = replace(context, rows=lambda: [join_rows(rows[:2])])
    with pytest.raises(UserError, match=r"data\.packing: true, but a memory must know the document"):
        make("memory").fit(packed)
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        make("memory", share=0.6, cache_share=0.4)


@pytest.mark.parametrize("code_bytes", [0, 16])
def test_an_index_on_disk_finds_what_a_search_through_all_keys_finds(context, rows, code_bytes):
    """Exactly so where every cell is looked into and keys are whole; most of it where they are coded."""
    pytest.importorskip("faiss")
    coded = {"code_bytes": code_bytes} if code_bytes else {}
    methods = {"exact": make("memory"), "disk": make("memory", cells=4, probes=4, **coded)}
    many = rows * 12 if code_bytes else rows  # 256 codes are learned from enough of them
    teacher, found = load_model(context.bases[0]), {}
    queries = torch.tensor(states(teacher, rows[4])[0][3:12]).float() + 0.1
    for name, method in methods.items():
        here = replace(context, folder=context.folder / name, rows=lambda: many)
        here.folder.mkdir()
        method.fit(here)
        with torch.no_grad(), method.attached(teacher, here):
            answer(method, teacher, collate([rows[2], rows[7]], 0))  # distributions, checked
            numbers = [method.parts.documents[rows[place].document] for place in (2, 7)]
            own = torch.tensor([*numbers, *numbers, *numbers, -1, -1, -1])
            found[name] = method.parts.find(queries, own, 6)
        places = torch.from_numpy(np.load(here.folder / "documents.npy"))
        assert (places[found[name][1]] != own[:, None]).all()
    assert (context.folder / "exact" / "keys.npy").is_file()
    assert not (context.folder / "disk" / "keys.npy").exists()
    if not code_bytes:
        torch.testing.assert_close(found["disk"][0], found["exact"][0], atol=1e-3, rtol=1e-4)
    keys = torch.from_numpy(np.load(context.folder / "exact" / "keys.npy"))
    true = (keys[found["disk"][1]] - queries[:, None]).square().sum(-1)
    assert (true.mean(1) <= 1.3 * found["exact"][0].mean(1)).all()


def test_a_cell_with_too_few_moments_and_settings_without_cells_are_refused(context):
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match=r"1000 with \d+ moments; 39 for each cell"):
        make("memory", cells=1000).fit(context)
    with pytest.raises(UserError, match="`probes` and `code_bytes` need `cells`"):
        make("memory", probes=3)
    with pytest.raises(UserError, match="`cells` needs a `share`"):
        make("memory", share=0, cache_share=0.2, cells=3)
