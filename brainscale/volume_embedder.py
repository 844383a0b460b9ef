"""The encoder as a transformer of scikit-learn: NIfTI paths, or rows of a store, in; features out."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from brainscale.features import check_recipe, choose_device, embed, embed_files, feature_names, opened
from brainscale.nifti_rows import find, plan_grid_xyz
from brainscale.pretrained import Pretrained
from brainscale.settings import InputError
from brainscale.stores import open_stores
from brainscale_data_prep import tree


class VolumeEmbedder(TransformerMixin, BaseEstimator):
    """Scans → features (n,D) float32 of a pretrained encoder, which learns nothing from what it is fitted with.

    X: paths of NIfTI files, prepared by the encoder's plan; or, with a store, rows of it: (n,) or (n,1). A scan that
    cannot be taken is an InputError, since none may be left out here. In cross-validation give the pipeline a `memory`,
    or each fold computes features again.
    """

    def __init__(
        self,
        encoder: str | Path | Pretrained,
        store: str | Path | None = None,
        *,
        layers: tuple[int, ...] = (-1,),
        pooling: str = "mean",
        foreground_only: bool = False,
        part: str = "",
        device: str = "auto",
        batch: int = 0,
        workers: int = 1,
    ) -> None:
        """encoder: a run folder, an export directory, or what was loaded of one; part: as in `features.opened`. The
        others: as in `features.embed` and `embed_files`."""
        self.encoder, self.store = encoder, store
        self.layers, self.pooling, self.foreground_only = layers, pooling, foreground_only
        self.part, self.device, self.batch, self.workers = part, device, batch, workers

    def fit(self, X: Any = None, y: Any = None) -> "VolumeEmbedder":
        """Load the encoder. X and y are not looked at."""
        check_recipe(self.layers, self.pooling)
        choose_device(self.device)
        loaded = self.encoder if isinstance(self.encoder, Pretrained) else opened(self.encoder, self.part)
        self.names_ = feature_names(loaded.settings.width, self.layers, self.pooling)
        self.pretrained_ = loaded
        return self

    def transform(self, X: Any) -> np.ndarray:
        """(n,D) float32. Raises InputError for a scan that cannot be taken, or a store of another plan."""
        check_is_fitted(self)
        items = np.asarray(X, dtype=object)
        if items.ndim == 2 and items.shape[1] == 1:
            items = items[:, 0]
        if items.ndim != 1:
            raise InputError(f"got an array of shape {items.shape}; give paths or rows as (n,) or (n,1)")
        wanted, at = np.unique([str(item) for item in items], return_inverse=True)
        recipe: dict[str, Any] = {
            "layers": self.layers,
            "pooling": self.pooling,
            "foreground_only": self.foreground_only,
            "device": choose_device(self.device),
            "batch": self.batch,
        }
        if self.store is not None:
            if wrong := [text for text in wanted.tolist() if not text.isdecimal()]:
                raise InputError(f"got {wrong[0]!r}; with a store, X must be rows of it")
            return embed(self.pretrained_, open_stores([self.store]), wanted.astype(np.int64), **recipe)[at]
        if wrong := [text for text in wanted.tolist() if not tree.split(text)[1]]:
            raise InputError(f"got {wrong[0]!r}, which is no path of a NIfTI file; give those, or a store and its rows")
        files, contract = find([Path(text) for text in wanted])[0], self.pretrained_.contract
        grid_xyz = plan_grid_xyz(contract.plan, contract.volume_zyx)
        found = embed_files(self.pretrained_, files, grid_xyz, self.workers, **recipe)
        for _, file, why in found.refused:
            raise InputError(f"{file.path} cannot be taken ({why.code}): {why.sentence}")
        return found.features[at]

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """(D,) names, see `features.feature_names`."""
        check_is_fitted(self)
        return np.array(self.names_, dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        return tags
