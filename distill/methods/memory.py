"""A memory of what followed similar moments: in a datastore of training text, and in the row itself."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from distill.method import Card, Method, MethodContext, TeacherOutput, plain_output
from distill.models.generation import refuse_packing
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, Row, batches, pad_id, tokens_per_batch
from eval.core.errors import UserError, require_installed

KEYS, VALUES, PLACES, DOCUMENTS = "keys.npy", "values.npy", "documents.npy", "documents.json"
INDEX = "keys.faiss"
PACKING = "a memory must know the document of every token"
QUERIES = 256  # searched at a time: distances to every key are held for so many
GROUP = 16  # keys of which the nearest is looked at first
FEWEST, MOST = 39, 256  # keys per cell from which faiss learns where the cells lie
CODES = 2**8  # of each byte of a coded key

Find = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Datastore:
    """M moments of training text."""

    find: Find  # queries [N, D], own documents [N], K -> squared distances [N, K] and entries [N, K]
    values: Tensor  # [M] int64, the token that came, or the class of the text
    documents: dict[str, int]  # of which moments are, as numbers


def nearest(
    keys: Tensor, halves: Tensor, queries: Tensor, own: Tensor, places: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances [N, K] and numbers [N, K] of the nearest keys, the nearest first; exact.

    The K nearest lie in the K groups of keys whose nearest is nearest: only those are sorted.

    Args:
        keys: [M, D] float32, M a multiple of `GROUP`; halves: [M], half the square of each, or infinity.
        queries: [N, D] float32; own: [N] int64, the document whose keys a query must not find.
        places: [M] int64, the document of each key.
    """
    distances = torch.addmm(halves, queries, keys.mT, alpha=-1)  # half, and less half the query's square
    for document in own.unique():
        asked, barred = (own == document).nonzero(), (places == document).nonzero()[:, 0]
        distances[asked, barred] = torch.inf
    groups = distances.unflatten(1, (-1, GROUP))
    chosen = groups.amin(-1).topk(min(count, groups.shape[1]), largest=False).indices
    near = groups.take_along_dim(chosen[..., None], 1).flatten(1)  # [N, K * GROUP]
    closest = near.topk(min(count, near.shape[1]), largest=False)
    entries = chosen.gather(1, closest.indices // GROUP) * GROUP + closest.indices % GROUP
    squares = (2 * closest.values + queries.square().sum(-1, keepdim=True)).clamp_min(0)
    return squares, entries


def find_among_all(keys: Tensor, places: Tensor) -> Find:
    """An exact search through every key.

    Args:
        keys: [M, D] float32, the last hidden state after which a token came.
        places: [M] int64, the document that it is of.
    """
    count = len(keys)
    keys = pad(keys, (0, 0, 0, -count % GROUP))
    halves = keys.square().sum(-1) / 2
    halves[count:] = torch.inf
    places = pad(places, (0, -count % GROUP), value=-1)

    def find(queries: Tensor, own: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
        parts = [
            nearest(keys, halves, some, one, places, min(neighbours, count))
            for some, one in zip(queries.split(QUERIES), own.split(QUERIES), strict=True)
        ]
        distances, entries = zip(*parts, strict=True)
        return torch.cat(distances), torch.cat(entries)

    return find


def find_on_disk(file: Path, places: np.ndarray, probes: int) -> Find:
    """A search through the cells of an index on disk that are nearest to a query; fewer than K: infinity."""
    faiss = require_faiss()
    index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    order = np.argsort(places, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(places))])

    def find(queries: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
        distances = np.full((len(queries), count), np.inf, np.float32)
        entries = np.zeros((len(queries), count), np.int64)
        vectors = queries.cpu().numpy()
        for document in own.unique().tolist():
            mask = (own == document).cpu().numpy()
            own_entries = order[starts[document] : starts[document + 1]] if document >= 0 else order[:0]
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(own_entries))
            settings = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            far, numbers = index.search(vectors[mask], count, params=settings)
            distances[mask] = np.where(numbers < 0, np.inf, far)
            entries[mask] = np.maximum(numbers, 0)
        return torch.from_numpy(distances).to(queries.device), torch.from_numpy(entries).to(queries.device)

    return find


def write_index(keys: np.ndarray, cells: int, code_bytes: int, seed: int, file: Path) -> None:
    """An inverted file of the keys by k-means; with `code_bytes` each key is product quantized to so many.

    Args:
        keys: [M, D] float32, read in parts.

    Raises:
        UserError: there are too few keys for so many cells, or the width is no multiple of `code_bytes`.
    """
    faiss, (total, width) = require_faiss(), keys.shape
    if total < FEWEST * cells or (code_bytes and total < FEWEST * CODES):
        problem = f"{cells} with {total} moments; {FEWEST} for each cell and each of {CODES} codes are needed"
        raise UserError("method.settings.cells", problem, "lower it, or take more rows (data.train_rows)")
    if code_bytes and width % code_bytes:
        problem = f"{code_bytes} for states of {width} numbers"
        raise UserError("method.settings.code_bytes", problem, f"give a divisor of {width}")
    quantizer = faiss.IndexFlatL2(width)
    index = (
        faiss.IndexIVFPQ(quantizer, width, cells, code_bytes, 8)
        if code_bytes
        else faiss.IndexIVFFlat(quantizer, width, cells)
    )
    index.cp.seed = seed
    learned = min(total, MOST * max(cells, CODES if code_bytes else 0))
    chosen = np.sort(np.random.default_rng(seed).choice(total, learned, replace=False))
    index.train(keys[chosen])
    for start in range(0, total, 2**16):
        index.add(keys[start : start + 2**16])
    faiss.write_index(index, str(file))


def require_faiss() -> Any:
    """The module.

    Raises:
        UserError: it is not installed.
    """
    require_installed("faiss", "method.settings.cells", "run `pip install '.[faiss]'`, or leave `cells` out")
    import faiss

    return faiss


def predicting_states(hidden: Tensor, batch: Batch) -> Tensor:
    """[N, D] states of [B, T, D] after which the N predicted tokens come; [B, 1, D] are of whole rows."""
    return hidden[:, 0] if _whole_rows(hidden, batch) else hidden[:, :-1][batch.mask]


def _whole_rows(hidden: Tensor, batch: Batch) -> bool:
    return batch.classes is not None and hidden.shape[1] == 1


def votes(weights: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """[..., V] probabilities of tokens [..., K] that have logits `weights` [..., K]; all zero if none counts.

    An entry of -inf does not count.
    """
    shares = weights.softmax(-1).nan_to_num(0.0)
    return shares.new_zeros(*shares.shape[:-1], vocabulary).scatter_add_(-1, tokens, shares)


class Memory(Method):
    card = Card(
        title="Memory",
        paper="kNN-LM: Khandelwal et al. 2020, arXiv:1911.00172; continuous cache: Grave, Joulin and Usunier "
        "2017, arXiv:1612.04426",
        claim="what followed similar moments, elsewhere or earlier in this text, is likely to follow again; "
        "a text is of the class that its nearest neighbours are of",
        touches="the output: distributions of remembered tokens are mixed in",
        limits="without `cells` an exact search through every key; what has to be looked up may be too much "
        "for the weights of a student",
    )

    classifies = True

    class Settings(Frozen):
        share: float = Field(0.25, ge=0, lt=1, description="of the datastore in the mixture; 0: none is made")
        neighbours: int = Field(64, gt=0, description="moments that are remembered at a time")
        temperature: float = Field(1.0, gt=0, description="divides squared distances")
        cache_share: float = Field(0.0, ge=0, lt=1, description="of the row's own past in the mixture")
        flatness: float = Field(0.3, ge=0, description="factor of the products of hidden states in the cache")
        cells: int = Field(
            0, ge=0, description="of an index on disk (faiss) that a search looks into; 0: all is in memory"
        )
        probes: int = Field(32, gt=0, description="cells that are looked into, the nearest to the query")
        code_bytes: int = Field(0, ge=0, description="bytes of a key in the index; 0: four for each number")
        shuffled: bool = Field(
            False, description="remember tokens that came at other moments, and match none in the cache"
        )

        @model_validator(mode="after")
        def shares_leave_some(self) -> Self:
            if not 0 < self.share + self.cache_share < 1:
                raise ValueError("`share` and `cache_share` together must lie between 0 and 1")
            if self.cells and not self.share:
                raise ValueError("`cells` needs a `share` of the datastore")
            if not self.cells and {"probes", "code_bytes"} & self.model_fields_set:
                raise ValueError("`probes` and `code_bytes` need `cells`")
            if self.cells:
                require_faiss()
            return self

    def check_task(self, task: str) -> None:
        super().check_task(task)
        if task == "classification" and self.settings.cache_share:
            problem = f"{self.settings.cache_share:g}, and a text that is classified has no classes before"
            raise UserError("method.settings.cache_share", problem, "set it to 0: the datastore votes")

    def control(self) -> Method:
        """The same keys with the values of others; in the cache every past token counts the same."""
        return Memory(self.settings.model_copy(update={"shuffled": True}))

    @property
    def fits(self) -> bool:
        return self.settings.share > 0

    def fit(self, context: MethodContext) -> None:
        """Writes the datastore: a key and a value for every token that the training rows predict."""
        if not self.fits:
            return
        model, rows = context.load_base(context.seed), context.rows()
        refuse_packing(any(row.packed for row in rows), PACKING)
        total, width = sum(row.predicted for row in rows), model.config.get_text_config().hidden_size
        keys = np.lib.format.open_memmap(context.folder / KEYS, "w+", np.float32, (total, width))
        values, places = np.zeros(total, np.int64), np.zeros(total, np.int64)
        documents, start = _numbers(rows), 0
        size = tokens_per_batch(model.config.get_text_config().vocab_size, model.device)
        for batch in batches(rows, pad_id(context.tokenizer), size):
            moved = batch.to(model.device)
            with torch.no_grad():
                hidden = predicting_states(plain_output(model, batch=moved).hidden[0], moved)
            end = start + len(hidden)
            keys[start:end] = hidden.float().cpu().numpy()
            values[start:end] = batch.labels[batch.mask].numpy()
            numbers = torch.tensor([documents[name] for name in batch.documents])
            places[start:end] = numbers.repeat_interleave(batch.mask.sum(1)).numpy()
            start = end
        keys.flush()
        if self.settings.cells:
            size = self.settings.code_bytes
            write_index(keys, self.settings.cells, size, context.seed, context.folder / INDEX)
            (context.folder / KEYS).unlink()
        if self.settings.shuffled:
            np.random.default_rng(context.seed).shuffle(values)
        np.save(context.folder / VALUES, values)
        np.save(context.folder / PLACES, places)
        write_text(context.folder / DOCUMENTS, json.dumps(documents))

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> Datastore | None:
        if not self.fits:
            return None
        folder = context.folder
        places, values = np.load(folder / PLACES), torch.from_numpy(np.load(folder / VALUES))
        if self.settings.cells:
            find = find_on_disk(folder / INDEX, places, self.settings.probes)
        else:
            keys, numbers = torch.from_numpy(np.load(folder / KEYS)), torch.from_numpy(places)
            find = find_among_all(keys.to(teacher.device), numbers.to(teacher.device))
        documents = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8"))
        return Datastore(find, values.to(teacher.device), documents)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """Tokens of the row's own document are never found in the datastore."""
        refuse_packing(batch.positions is not None, PACKING)
        output = self.model_output(teacher, batch)
        if len(output.hidden) != 1:
            problem = "needs the states of one model, and the methods before it in the chain give none"
            raise UserError("method memory", problem, "put it before those that mix distributions")
        hidden, plain = output.hidden[0].float(), output.dense().exp()
        mixed, left = torch.zeros_like(plain), torch.ones_like(plain[..., :1])
        for share, remembered in (
            (self.settings.share, self._from_datastore(hidden, batch, plain.shape[-1])),
            (self.settings.cache_share, self._from_cache(hidden, batch, plain.shape[-1])),
        ):
            if remembered is not None:
                mixed += share * remembered
                left -= share * remembered.sum(-1, keepdim=True)  # where nothing is remembered it keeps all
        return TeacherOutput((left * plain + mixed).log())

    def _from_datastore(self, hidden: Tensor, batch: Batch, vocabulary: int) -> Tensor | None:
        """[B, T, V] probabilities of what followed the nearest moments of other documents."""
        if self.parts is None:
            return None
        store: Datastore = self.parts
        own = torch.tensor([store.documents.get(name, -1) for name in batch.documents], device=hidden.device)
        valid = batch.attention_mask.bool()
        if _whole_rows(hidden, batch):
            valid = valid.new_ones(len(valid), 1)
        queries, own = hidden[valid], own.repeat_interleave(valid.sum(1))
        remembered = hidden.new_zeros(*valid.shape, vocabulary)
        distances, entries = store.find(queries, own, self.settings.neighbours)
        remembered[valid] = votes(-distances / self.settings.temperature, store.values[entries], vocabulary)
        return remembered

    def _from_cache(self, hidden: Tensor, batch: Batch, vocabulary: int) -> Tensor | None:
        """[B, T, V] probabilities of what followed earlier moments of the row."""
        if not self.settings.cache_share:
            return None
        length = hidden.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril(-1)
        flatness = 0.0 if self.settings.shuffled else self.settings.flatness
        match = (flatness * hidden @ hidden.mT).masked_fill(~past, -torch.inf)  # [B, T, T]
        following = batch.input_ids.roll(-1, 1)[:, None].expand(-1, length, -1)
        return votes(match, following, vocabulary)


def _numbers(rows: Sequence[Row]) -> dict[str, int]:
    """Document -> its number, in the order of the rows."""
    return {name: number for number, name in enumerate(dict.fromkeys(row.document for row in rows))}
