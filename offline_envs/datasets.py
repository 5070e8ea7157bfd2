"""Files of data: where they lie, how they are downloaded, and D4RL's layout of arrays."""

import http.client
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from filelock import FileLock
from tqdm import tqdm

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
ROBOMIMIC_SERVER = "http://downloads.cs.stanford.edu/downloads/rt_benchmark"
OGBENCH_SERVER = "https://rail.eecs.berkeley.edu/datasets/ogbench"
TIMEOUT = 30  # seconds without a byte, after which a download counts as broken


def read(file, mask=None):
    """The arrays of D4RL's layout in an open file. ValueError for a `mask`, which only robomimic's files have."""
    if mask:
        raise ValueError(f"it has no mask {mask}: only robomimic's files have masks")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    arrays = {key: file[key][()] for key in keys if key in file}
    for key in {"rewards", "terminals", "timeouts"} & set(arrays):
        if arrays[key].shape[1:] not in ((), (1,)):
            raise ValueError(f"its {key} have shape {arrays[key].shape}, not one number a row")
        arrays[key] = arrays[key].reshape(-1)
    return same_length(arrays)


def same_length(arrays):
    """The arrays as they are. Raises ValueError where they have different lengths, or none."""
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"its columns have different lengths, or none: {lengths}")
    return arrays


def join(episodes):
    """Arrays (N, ...) from a list of episodes, each a dict of arrays (T, ...); a timeout in the last row of each."""
    if not episodes:
        raise ValueError("it has no episodes")
    keys = set.intersection(*(set(same_length(episode)) for episode in episodes))
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in keys}
    ends = np.cumsum([len(episode["rewards"]) for episode in episodes]) - 1
    return arrays | {"timeouts": np.isin(np.arange(ends[-1] + 1), ends)}


def best_rewards(arrays, ends):
    """Adds what an episode that ends in each of `ends` (N,) would return in an environment that pays for a task once,
    where the dataset pays in every step in which it is done."""
    first = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    return arrays | {"episode_returns": np.maximum.reduceat(arrays["rewards"], first)}


def file_name(url):
    """D4RL tells its files apart by name, robomimic by folder."""
    return url.removeprefix(f"{ROBOMIMIC_SERVER}/") if url.startswith(ROBOMIMIC_SERVER) else url.rsplit("/", 1)[-1]


def local_path(dataset):
    """Where the file of a URL lies in the cache, or will lie. A file that ships with this package stays where it is."""
    if isinstance(dataset, Path):
        return dataset
    variable, folder = "D4RL_DATASET_DIR", "~/.d4rl/datasets"
    if dataset.startswith(OGBENCH_SERVER):
        variable, folder = "OGBENCH_DATASET_DIR", "~/.ogbench/data"  # the folder is that of OGBench's own package
    folder = Path(os.environ.get(variable) or folder)
    try:
        return folder.expanduser() / file_name(dataset)
    except RuntimeError:  # a user without a home, or a "~user" that there is not
        raise OSError(f"{folder} has no home directory here: set {variable} to another folder.") from None


def split_mask(path):
    """A path and, where it ends in ".hdf5:NAME", the name of a subset of robomimic's demonstrations."""
    name, _, mask = str(path).partition(".hdf5:")
    return (Path(f"{name}.hdf5"), mask) if mask else (Path(path), None)


def fetch(dataset):
    """The path of a dataset, downloaded first where it is not in the cache."""
    path = local_path(dataset)
    if not path.exists() and not isinstance(dataset, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # another process may be downloading it: wait, then use its file
            if not path.exists():
                download(dataset, path)
        Path(f"{path}.lock").unlink(missing_ok=True)
    return path


def download(url, path):
    """Downloads `url` to `path`, whole or not at all. What has arrived when the line breaks is kept under another name;
    the next of three attempts, or the next call, goes on from there."""
    for _ in range(3):
        try:
            return download_part(url, path).replace(path)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500:  # the server will not answer otherwise next time
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
    raise OSError(f"{url} could not be downloaded ({reason}): try again, put it at {path}, or pass --dataset-path.")


def download_part(url, path):
    """One attempt, from where the last one stopped. Returns the whole file, still under its other name."""
    response = urllib.request.urlopen(url, timeout=TIMEOUT)
    size, version = response.headers["Content-Length"], response.headers["ETag"] or response.headers["Last-Modified"]
    if size is None:
        raise ValueError("the server does not say how long the file is")
    # The name tells versions of the file apart, so that two of them are never joined.
    part = path.with_name(f"{path.name}.{zlib.crc32(f'{size} {version}'.encode()):08x}.part")
    size, have = int(size), part.stat().st_size if part.exists() else 0
    have = have if have < size else 0
    if have:
        response.close()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
        have = have if response.status == 206 else 0  # 200: the server sends all of it again
    bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name)
    with response, bar, open(part, "ab" if have else "wb") as file:
        while chunk := response.read1(1 << 20):
            bar.update(file.write(chunk))
    if part.stat().st_size != size:
        raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
    is_data, kind = (zipfile.is_zipfile, ".npz") if path.suffix == ".npz" else (h5py.is_hdf5, "HDF5")
    if not is_data(part):  # a login page, say
        part.unlink()
        raise OSError(f"what the server sent is no {kind} file")
    return part
