"""Makes maze2d-large-demos-v1.hdf5, the dataset that ships with this repository. Run from anywhere:

    python demos/make_demos.py [--out FILE]

Three demonstrations of 800 steps from cell (1, 1) of D4RL's large maze to its goal. A controller follows the shortest
path cell by cell (D4RL's proportional and derivative gains, 10 and -1), then holds the goal. Its actions carry
Gaussian noise of standard deviation 0.3: without noise the demonstrations hold a single line through the maze and no
correction of any error that a policy could learn from.
"""

import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # offline_envs, vqvae
from vqvae import check_numbers, exit_in_words


@dataclass
class Args:
    out: Path = Path(__file__).parent / "maze2d-large-demos-v1.hdf5"  # where to write the dataset
    episodes: int = 3  # number of demonstrations
    noise: float = 0.3  # standard deviation of the noise added to the controller's actions
    seed: int = 0  # episode i resets the environment and draws its noise with seed + i


def shortest_path(cells, start, goal):
    """Breadth-first search over the free cells; returns the cells (P, 2) from `start` to `goal`, both included."""
    came_from, queue = {goal: None}, deque([goal])
    while start not in came_from:
        row, column = cell = queue.popleft()
        for step in [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]:
            if cells[step] != "#" and step not in came_from:
                came_from[step] = cell
                queue.append(step)
    path = [start]
    while path[-1] != goal:
        path.append(came_from[path[-1]])
    return np.array(path)


def demonstrate(env, seed, noise):
    """Runs one noisy demonstration; returns its observations, actions and rewards."""
    maze, rng = env.unwrapped, np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    path = shortest_path(maze.cells, tuple(maze.starts[0]), tuple(maze.goal))
    observations, actions, rewards, reached, truncated = [], [], [], 0, False
    while not truncated:
        # Cell (r, c) has its centre at (r - 0.2, c - 0.2), the goal lies at its cell's own index.
        target = path[reached] - 0.2 if reached < len(path) - 1 else maze.goal
        if np.linalg.norm(target - obs[:2]) < 0.6 and reached < len(path) - 1:
            reached += 1
        action = np.clip(10 * (target - obs[:2]) - obs[2:], -1, 1)
        action = np.clip(action + noise * rng.standard_normal(2), -1, 1).astype(np.float32)
        observations.append(obs)
        actions.append(action)
        obs, reward, _, truncated, _ = env.step(action)
        rewards.append(reward)
    return observations, actions, rewards


def main():
    args = tyro.cli(Args, description=__doc__)
    check_numbers(vars(args), episodes=(1, 1e6), noise=(0, 1e9), seed=(0, 2**31 - args.episodes))
    env = gym.make("offline_envs:maze2d-large-demos-v1")
    episodes = [demonstrate(env, args.seed + i, args.noise) for i in range(args.episodes)]
    observations, actions, rewards = (np.concatenate(part).astype(np.float32) for part in zip(*episodes, strict=True))
    timeouts = np.zeros(len(rewards), bool)
    timeouts[np.cumsum([len(episode[2]) for episode in episodes]) - 1] = True
    part = args.out.with_name(f"{args.out.name}.tmp")  # an interruption leaves the dataset that is there
    with h5py.File(part, "w") as file:
        for key, array in [("observations", observations), ("actions", actions), ("rewards", rewards)]:
            file.create_dataset(key, data=array, compression="gzip")
        file["terminals"], file["timeouts"] = np.zeros(len(rewards), bool), timeouts
    part.replace(args.out)
    print(f"{args.out}: {len(rewards)} transitions, returns {[float(sum(episode[2])) for episode in episodes]}")


if __name__ == "__main__":
    exit_in_words(main)
