"""Documents of one cluster, such as a package, are not independent: they are summed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Clusters(NamedTuple):
    """The documents of a slice by clusters: columns of the tables, and where each cluster begins in them."""

    order: NDArray[np.intp]  # [N]
    starts: NDArray[np.intp]  # [C]

    def sums(self, values: Array) -> Array:
        """[..., C] sums over the documents of each cluster, of values by document."""
        return np.add.reduceat(values[..., self.order], self.starts, axis=-1)


def by_cluster(names: list[str], columns: NDArray[np.intp]) -> Clusters:
    """Clusters of the documents at `columns`, which have these names of clusters, as they first come."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    cluster = np.array([places[name] for name in names])
    order = np.argsort(cluster, kind="stable")
    return Clusters(columns[order], np.searchsorted(cluster[order], np.arange(len(places))))
