"""Silos out of one unlabelled corpus: its documents clustered by their words and characters."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, Normalizer

from dept_fl.checkpoint import whole_folder
from dept_fl.errors import DeptError
from dept_fl.named_files import NamedFiles
from dept_fl.progress import Progress
from dept_fl.report import size, table

Labelled = tuple[str, str]  # a document and its true source, "" where nobody knows it
Ints = npt.NDArray[np.int64]
Texts = Sequence[str]

MOST_SILOS = 500  # a file is open for each
_SAMPLE_DOCUMENTS = 10_000  # that the clusters are fitted on
_EXCERPT_CHARACTERS, _EXCERPT_PARTS = 2000, 4  # what is looked at of a document
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 22
_FEATURES = 1 << 16
_DIMENSIONS = 32
_STARTS = 10
_TERMS = 8  # that are shown of each cluster
_TERM_FEATURES = 50_000
# Scripts without spaces have no words to find: two characters stand for one.
_TERM = r"[぀-ヿ㐀-䶿一-鿿]{2}|[^\W\d_]{2,}"
_SMALL = 0.1  # of an equal share of the text
_MOST_SOURCES = 1000


# ---- the clusters --------------------------------------------------------------------------


class Clusters:
    """k-means over documents as points on a sphere, largest cluster first.

    A document is the TF-IDF of its words and of its one- and two-character strings, reduced by
    a truncated SVD (latent semantic analysis) and scaled to length 1. It weighs by the square
    root of its bytes: text is what silos are made of, but one book shall not be a cluster.

    Args:
        texts: the documents to fit; only `excerpt` of each is looked at.
        seed: the same texts in the same order and the same seed give the same clusters.

    Raises:
        DeptError: there are fewer kinds of documents than clusters.
    """

    def __init__(self, texts: Texts, weights: Sequence[float], count: int, seed: int) -> None:
        if len(texts) < count:
            raise DeptError(
                f"--silos {count}: the corpus has only {len(texts)} different documents; ask for "
                "fewer silos"
            )
        dimensions = min(max(_DIMENSIONS, count), len(texts))
        self._points = make_pipeline(
            FunctionTransformer(_excerpts),
            make_union(
                _tf_idf(analyzer="word", token_pattern=r"\w+|[^\w\s]"),
                _tf_idf(analyzer="char", ngram_range=(1, 2)),
            ),
            TruncatedSVD(dimensions, random_state=seed),
            Normalizer(),
        )
        points = self._points.fit_transform(texts)
        self._means = KMeans(count, n_init=_STARTS, random_state=seed)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            found = self._means.fit_predict(points, sample_weight=np.sqrt(weights))
        self._number = _by_size(found, weights, count)

    def assign(self, texts: Texts) -> Ints:
        """[n] the cluster of each document, 0 to k - 1."""
        assigned: Ints = self._number[self._means.predict(self._points.transform(texts))]
        return assigned


def _excerpts(texts: Texts) -> list[str]:
    return [excerpt(text) for text in texts]


def _tf_idf(**options: Any) -> Pipeline:
    counts = HashingVectorizer(
        n_features=_FEATURES, alternate_sign=False, norm=None, lowercase=False, **options
    )
    return make_pipeline(counts, TfidfTransformer(sublinear_tf=True))


def _by_size(found: Ints, weights: Sequence[float], count: int) -> Ints:
    """[count] the new number of each cluster, so that the one with most text is the first."""
    if len(np.unique(found)) < count:
        raise DeptError(
            f"--silos {count}: only {len(np.unique(found))} kinds of documents can be told apart; "
            "ask for fewer silos"
        )
    order = np.argsort(-np.bincount(found, weights=np.asarray(weights)), kind="stable")
    return np.argsort(order)


def excerpt(text: str) -> str:
    """A long document's parts of equal length from places spread evenly over it."""
    if len(text) <= _EXCERPT_CHARACTERS:
        return text
    length = _EXCERPT_CHARACTERS // _EXCERPT_PARTS
    stride = (len(text) - length) / (_EXCERPT_PARTS - 1)
    starts = [round(stride * part) for part in range(_EXCERPT_PARTS)]
    return "\n".join(text[start : start + length] for start in starts)


def sample(texts: Iterable[str], count: int, seed: int) -> dict[str, int]:
    """Up to `count` different documents as excerpts, with the bytes of the whole ones.

    Those with the lowest seeded digests: a random sample that depends neither on the documents'
    order nor on how often one is repeated.
    """
    key = str(seed).encode()
    heap: list[tuple[int, str, int]] = []
    held: set[int] = set()
    for text in texts:
        encoded = text.encode()
        digest = -int.from_bytes(hashlib.blake2b(encoded, digest_size=8, key=key).digest())
        if digest in held or (len(heap) == count and digest < heap[0][0]):
            continue
        held.add(digest)
        heapq.heappush(heap, (digest, excerpt(text), len(encoded)))
        if len(heap) > count:
            held.remove(heapq.heappop(heap)[0])
    return {text: text_bytes for _, text, text_bytes in sorted(heap, reverse=True)}


def marks(texts: Texts, assigned: Ints, count: int, terms: int = _TERMS) -> list[list[str]]:
    """For each cluster the words by which its documents are best told from all others.

    By p * log(p / q): p is the share of the cluster's documents that have the word, q that of
    the other clusters' documents, each with one document more on both sides.
    """
    vectorizer = CountVectorizer(
        token_pattern=_TERM, lowercase=False, binary=True, max_features=_TERM_FEATURES
    )
    try:
        present = vectorizer.fit_transform(excerpt(text) for text in texts)
    except ValueError:  # there is no word in them
        return [[] for _ in range(count)]
    names = vectorizer.get_feature_names_out()
    everywhere = np.asarray(present.sum(axis=0)).ravel()
    found = []
    for cluster in range(count):
        inside = assigned == cluster
        within = np.asarray(present[inside].sum(axis=0)).ravel()
        p = (within + 1) / (inside.sum() + 2)
        q = (everywhere - within + 1) / ((~inside).sum() + 2)
        scores = np.where(within > 0, p * np.log(p / q), -np.inf)
        best = np.argsort(-scores, kind="stable")[:terms]
        found.append([str(names[i]) for i in best if scores[i] > 0])
    return found


# ---- agreement with the true sources ---------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far clusters and true sources are the same partition of the documents.

    Attributes:
        sources: their names, sorted.
        confusion: [sources, clusters] documents.
    """

    sources: list[str]
    confusion: Ints

    @property
    def adjusted_rand_index(self) -> float:
        """1 for the same partition, 0 for what chance gives (Hubert and Arabie, 1985)."""
        rows, columns, cells = self._pairs(1), self._pairs(0), self._pairs(None)
        expected = rows * columns / max(math.comb(int(self.confusion.sum()), 2), 1)
        most = (rows + columns) / 2
        return 1.0 if most == expected else (cells - expected) / (most - expected)

    def _pairs(self, axis: int | None) -> int:
        """Pairs of documents that are together: in a source, in a cluster, or in both."""
        counts = self.confusion if axis is None else self.confusion.sum(axis=axis)
        return sum(math.comb(int(n), 2) for n in counts.ravel())

    @property
    def normalised_mutual_information(self) -> float:
        """Mutual information over the mean of both entropies: from 0, independent, to 1."""
        rows, columns = (_entropy(self.confusion.sum(axis=axis)) for axis in (1, 0))
        if rows + columns == 0:
            return 1.0
        return max(0.0, 2 * (rows + columns - _entropy(self.confusion)) / (rows + columns))

    @property
    def purity(self) -> float:
        """Share of the documents that are of their cluster's most frequent source."""
        return float(self.confusion.max(axis=0).sum() / self.confusion.sum())

    def as_dict(self, clusters: Sequence[str]) -> dict[str, Any]:
        """With the documents of each source by cluster, where there are any."""
        counts = zip(self.sources, self.confusion.tolist(), strict=True)
        return {
            "adjusted_rand_index": self.adjusted_rand_index,
            "normalised_mutual_information": self.normalised_mutual_information,
            "purity": self.purity,
            "sources": {
                source: {name: n for name, n in zip(clusters, row, strict=True) if n}
                for source, row in counts
            },
        }


def _entropy(counts: Ints) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def agreement(pairs: Counter[tuple[str, int]], clusters: int) -> Agreement:
    """Of how many documents are of which source and in which cluster."""
    sources = sorted({source for source, _ in pairs})
    confusion = np.array([[pairs[source, c] for c in range(clusters)] for source in sources])
    return Agreement(sources, confusion)


# ---- a corpus on disk --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What `dept silo split` is asked for.

    Attributes:
        labels: the column that names a document's true source; empty: nobody knows it.
        settings: words KEY=VALUE of further settings of the source.
    """

    files: list[str]
    out: Path
    silos: int
    seed: int = 1
    column: str = "text"
    labels: str = ""
    settings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One of the silos; `terms` mark it."""

    name: str
    documents: int
    text_bytes: int
    terms: list[str]


@dataclass(frozen=True)
class Split:
    """A corpus in silos: DIR/<silo>.jsonl and DIR/silos.yaml.

    Attributes:
        fitted: how many different documents the clusters were fitted on.
        agreement: with the true sources, where they are known.
    """

    folder: Path
    parts: list[Part]
    fitted: int
    seed: int
    agreement: Agreement | None

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for part in self.parts)

    @property
    def small(self) -> list[Part]:
        """Those with less than a tenth of an equal share of the text."""
        least = _SMALL * self.text_bytes / len(self.parts)
        return [part for part in self.parts if part.text_bytes < least]

    def to_json(self) -> str:
        facts = {
            "folder": str(self.folder),
            "seed": self.seed,
            "fitted_documents": self.fitted,
            "silos": {
                p.name: {"documents": p.documents, "bytes": p.text_bytes, "terms": p.terms}
                for p in self.parts
            },
            "agreement": self.agreement
            and self.agreement.as_dict([part.name for part in self.parts]),
        }
        return json.dumps(facts, ensure_ascii=False)


def split_files(request: Request, progress: Progress) -> Split:
    """Cluster the documents of files into silos.

    Raises:
        DeptError: naming the option and the mend.
    """
    files = NamedFiles(request.files, request.column, request.settings)

    def corpus() -> Iterator[Labelled]:
        if request.labels:
            return files.labelled_documents(request.labels)
        return ((text, "") for text in files.documents())

    try:
        return split(corpus, request.out, request.silos, request.seed, progress)
    except OSError as error:
        raise DeptError(f"{error.filename or request.out}: {error.strerror or error}") from error


def split(
    corpus: Callable[[], Iterator[Labelled]], out: Path, silos: int, seed: int, progress: Progress
) -> Split:
    """Cluster documents into silos in two passes: a sample is fitted, then each is assigned.

    Memory holds the sample and a batch of documents, whatever the size of the corpus.

    Args:
        corpus: gives the same documents, with their true sources or "", each time it is called.
        out: a new folder.
    """
    if not 2 <= silos <= MOST_SILOS:
        raise DeptError(f"--silos {silos}: must be from 2 to {MOST_SILOS}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeptError(f"{out} is there already and is never overwritten; choose another --out")
    with progress.stage("reading, to draw a sample"):
        drawn = sample(progress.watch(t for t, _ in corpus()), _SAMPLE_DOCUMENTS, seed)
    texts, weights = list(drawn), list(drawn.values())
    clusters = progress.during(
        f"clustering {len(texts):,} documents", lambda: Clusters(texts, weights, silos, seed)
    )
    with progress.stage("finding what marks each silo"):
        terms = marks(texts, clusters.assign(texts), silos)
    with progress.stage("writing the silos"), whole_folder(out) as draft:
        writer = _Writer(draft, silos)
        with writer:
            writer.write(_watched(corpus(), progress), clusters)
        parts = [
            Part(_name(i, silos), writer.documents[i], writer.text_bytes[i], terms[i])
            for i in range(silos)
        ]
        (draft / "silos.yaml").write_text(_recipe(out, parts), encoding="utf-8")
    known = any(source for source, _ in writer.pairs)
    found = agreement(writer.pairs, silos) if known else None
    return Split(out, parts, len(texts), seed, found)


def _watched(pairs: Iterator[Labelled], progress: Progress) -> Iterator[Labelled]:
    for text, label in pairs:
        yield next(progress.watch(iter([text]))), label


def _batches(pairs: Iterator[Labelled]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    characters = 0
    for pair in pairs:
        batch.append(pair)
        characters += len(pair[0])
        if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _name(cluster: int, silos: int) -> str:
    return f"silo-{cluster + 1:0{len(str(silos))}d}"  # so that sorted names are in order


class _Writer:
    """Writes each document to its silo's file and counts."""

    def __init__(self, folder: Path, silos: int) -> None:
        self._files = [folder / f"{_name(i, silos)}.jsonl" for i in range(silos)]
        self.documents = [0] * silos
        self.text_bytes = [0] * silos
        self.pairs: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> _Writer:
        self._stack = ExitStack()
        opened = (file.open("w", encoding="utf-8") for file in self._files)
        self._streams: list[IO[str]] = [self._stack.enter_context(each) for each in opened]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, corpus: Iterator[Labelled], clusters: Clusters) -> None:
        for batch in _batches(corpus):
            assigned = clusters.assign([text for text, _ in batch])
            for (text, source), cluster in zip(batch, assigned.tolist(), strict=True):
                self._streams[cluster].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                self.documents[cluster] += 1
                self.text_bytes[cluster] += len(text.encode())
                self.pairs[source, cluster] += 1
            self._check_sources()

    def _check_sources(self) -> None:
        sources = {source for source, _ in self.pairs}
        if len(sources) > _MOST_SOURCES:
            shown = ", ".join(sorted(sources)[:3])
            raise DeptError(
                f"--labels: over {_MOST_SOURCES} different values (such as {shown}), so that it "
                "names no sources; give another column"
            )


def _recipe(out: Path, parts: list[Part]) -> str:
    """A recipe that `dept run` takes: these silos, and defaults for all else."""
    silos = []
    for part in parts:
        silos.append(f"  # {part.documents:,} documents, {size(part.text_bytes)}")
        silos.append(f"  {part.name}: {{files: [{part.name}.jsonl]}}")
    return "\n".join(
        [
            "# Made by `dept silo split`. For `dept run`; settings that are not given have the",
            "# defaults of dept_fl/config.py.",
            f"name: {json.dumps(_run_name(out))}",
            "model: {preset: llama-tiny}",
            "silos:",
            *silos,
            "",
        ]
    )


def _run_name(out: Path) -> str:
    return re.sub(r"[^\w-]+", "-", out.absolute().name)[:100] or "split"


# ---- what people see -----------------------------------------------------------------------


def show(found: Split) -> None:
    """Print the silos, what marks them, and their agreement with the true sources."""
    width = max(100, 30 + 12 * len(found.parts))  # a table that is cut says nothing
    console = Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(
        f"{found.documents:,} documents of {size(found.text_bytes)} in {len(found.parts)} silos, "
        f"fitted on {found.fitted:,} of them, seed {found.seed}"
    )
    rows = [
        [
            part.name,
            f"{part.documents:,}",
            size(part.text_bytes),
            f"{100 * part.text_bytes / found.text_bytes:.1f} %",
        ]
        for part in found.parts
    ]
    console.print(table(["silo", "documents", "text", "share of text"], rows))
    console.print("marked by")
    for part in found.parts:
        console.print(f"  {part.name}  {' '.join(part.terms)}")
    for part in found.small:
        console.print(
            f"small: {part.name} has {size(part.text_bytes)}, below a tenth of an equal share; "
            "it would be trained over and over on the same text: ask for fewer silos, or drop it"
        )
    if found.agreement:
        _show_agreement(console, found.agreement, found.parts)
    console.print(f"\nrecipe  {found.folder / 'silos.yaml'}")


def _show_agreement(console: Console, found: Agreement, parts: list[Part]) -> None:
    console.print(
        f"\nagreement with the true sources: adjusted Rand index {found.adjusted_rand_index:.3f}, "
        f"normalised mutual information {found.normalised_mutual_information:.3f}, "
        f"purity {found.purity:.3f}"
    )
    rows = zip(found.sources, found.confusion.tolist(), strict=True)
    cells = [[source, *(f"{count:,}" if count else "." for count in row)] for source, row in rows]
    console.print(table(["documents", *(part.name for part in parts)], cells))
