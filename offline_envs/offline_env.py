"""What every environment of this package answers, and how a name is registered with Gymnasium."""

import gymnasium as gym
import h5py
import numpy as np

from .datasets import fetch, file_name, local_path, read, split_mask


class OfflineEnv(gym.Wrapper):
    """An environment that knows its dataset and its reference scores.

    `dataset` is the URL of an HDF5 file, or the path of one that ships with this package; the file in `path` is used in
    its place. `ref_min_score`, `ref_max_score`: the returns of a random and of an expert policy, D4RL's 0 and 1."""

    def __init__(self, env, dataset, ref_min_score, ref_max_score, path=None):
        super().__init__(env)
        self.dataset, self.path, self.ref_min_score, self.ref_max_score = dataset, path, ref_min_score, ref_max_score

    def get_normalized_score(self, episode_return):
        """0 for D4RL's random policy, 1 for its expert. The tables of papers print 100 times this number."""
        return (episode_return - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)

    def provenance(self, h5path=None):
        """What a score over the data in `h5path`, by default the task's own, may be compared with: one sentence."""
        suite, path = getattr(self.env, "suite", "D4RL"), h5path or self.dataset_filepath
        official = isinstance(self.dataset, str) and f"/{path}".endswith(f"/{file_name(self.dataset)}")
        data = f"are {suite}'s" if official else f"are not {suite}'s, so do not compare with {suite}'s tables"
        return f"Score: 0 at a return of {self.ref_min_score:g}, 100 at {self.ref_max_score:g}; the data {data}."

    @property
    def dataset_filepath(self):
        """Where the dataset lies, or will lie once downloaded."""
        return self.path or local_path(self.dataset)

    def get_dataset(self, h5path=None):
        """Returns a dict of arrays: `observations (N, O)`, `actions (N, A)`, `rewards (N,)`, `terminals (N,)`, and
        `timeouts (N,)` and `next_observations (N, O)` where the file has them. Reads the task's own file, downloaded if
        need be, or another .hdf5 or .npz file. Raises OSError with one sentence where the task's own cannot be had or
        is damaged; of another file, whatever h5py and NumPy raise, and ValueError where its parts do not fit."""
        path, mask = split_mask(h5path or self.path or fetch(self.dataset))
        try:
            with np.load(path) if path.suffix == ".npz" else h5py.File(path) as file:
                return getattr(self.env, "read", read)(file, mask)
        except OSError as error:
            if path != local_path(self.dataset) or type(error) is not OSError:  # not there, or not permitted
                raise
            raise OSError(f"{path} is damaged ({error}): delete it to download it again.") from error


def make(base, dataset, ref_min_score, ref_max_score, dataset_path=None, render_mode=None, **kwargs):
    """The entry point behind every name: the environment `base` with its dataset, or the file in `dataset_path`, and
    reference scores. Robomimic's environments are made as their dataset says."""
    if getattr(base, "suite", "D4RL") == "robomimic":
        kwargs["path"] = dataset_path or fetch(dataset)
    return OfflineEnv(base(render_mode=render_mode, **kwargs), dataset, ref_min_score, ref_max_score, dataset_path)


def register(name, steps, base, dataset, low, high, **kwargs):
    """Tells Gymnasium of `name`: episodes of `steps` of an environment that the class `base` makes of `kwargs`, the URL
    or path of its dataset, the returns of a random and of an expert policy."""
    kwargs |= {"base": base, "dataset": dataset, "ref_min_score": low, "ref_max_score": high}
    gym.register(name, entry_point=f"{__package__}:make", max_episode_steps=steps, kwargs=kwargs)
