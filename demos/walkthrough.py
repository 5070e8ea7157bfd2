"""SAQ-CQL on three maze demonstrations, step by step: the method of saq_cql.py, in cells to be run one at a time. To be
short, it leaves observations as they are, and the agent's learning rate constant.

    python demos/walkthrough.py        (or cell by cell, in an editor that knows `# %%`; a minute on a core)

Figures go to $WALKTHROUGH_FIGURES, by default a folder among the system's temporary files; in a notebook they are shown
as well. $WALKTHROUGH_STEPS shortens it: gradient steps of the quantizer, and of the agent.
"""

# %% What it needs: the repository's own files, from its root
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(globals().get("__file__", "demos/walkthrough.py")).resolve().parents[1]))
from saq_cql import DiscreteCQL, defaults, evaluate, make_eval_envs
from vqvae import ActionVQVAE, codebook_health, describe_health, fit, load_task

STEPS = int(os.environ.get("WALKTHROUGH_STEPS", 2_000))
FIGURES = Path(os.environ.get("WALKTHROUGH_FIGURES", Path(tempfile.gettempdir()) / "saq-walkthrough"))
FIGURES.mkdir(parents=True, exist_ok=True)


def show(figure, name):
    """Saves a figure and says where; a notebook shows it too."""
    figure.savefig(FIGURES / name, dpi=80)
    print(f"figure: {FIGURES / name}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(filename=str(FIGURES / name)))


# %% The data: some 2,400 transitions of a point that is pushed through a maze. States are places and velocities (4
# numbers), actions are forces on it (2 numbers in [-1, 1]). The demonstrator's hand shakes: its actions carry noise.
torch.manual_seed(0)
args = defaults("maze2d-large-demos-v1")  # what saq_cql.py takes for this task, 4 codes among it
task, data = load_task(args.env, None, torch.device("cpu"))

# %% 1. Fit the quantizer: encode (s, a) into one of 4 codes, decode (s, code) into an action. `fit` is a generator, so
# the loop is yours: log what you like, stop when you like.
vqvae = ActionVQVAE(obs_dim=4, action_dim=2, num_codes=args.num_codes)
for step, info in fit(vqvae, data.obs, data.actions, STEPS, batch_size=64):
    if step % max(STEPS // 5, 1) == 0:
        print(f"step {step}: reconstruction loss {info['reconstruction_loss'].item():.3f}")

# %% Is it any good? All codes should be used, and the error be no larger than the noise of the data. Noise of standard
# deviation 0.3 has a mean square of 0.09, and four codes also tell some of that noise apart.
print(describe_health(codebook_health(vqvae, data.obs, data.actions)))

# %% What do the codes mean? Decode all of them in nine places of the first demonstration. A code has one colour. It
# does not point the same way everywhere, because the decoder sees the state; so four codes are enough for a whole maze.
places = data.obs[torch.linspace(0, 270, 9).long()]
meaning = torch.stack([vqvae.decode(places, torch.full((9,), k)) for k in range(args.num_codes)]).detach()  # (K, 9, A)


def draw_maze(axes):
    """Walls, demonstrations, goal. A place is (row, column); the cell (r, c) has its centre at (r - 0.2, c - 0.2)."""
    maze = task.env.unwrapped
    for row, column in np.argwhere(maze.cells == "#"):
        axes.fill_between([column - 0.7, column + 0.3], row - 0.7, row + 0.3, color="0.8", linewidth=0)
    axes.plot(data.obs[:, 1], data.obs[:, 0], ",", color="0.5")
    axes.plot(maze.goal[1], maze.goal[0], "k*", markersize=12)
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.invert_yaxis()


figure = Figure(figsize=(8, 6), layout="constrained")
axes = figure.subplots()
draw_maze(axes)
for k, actions in enumerate(meaning):
    axes.quiver(places[:, 1], places[:, 0], actions[:, 1], actions[:, 0], color=f"C{k}", angles="xy", width=0.005)
axes.set_title("what four codes mean along one demonstration: a code is a colour")
show(figure, "codes.png")

# %% 2. Replace every action by its code, once. From here on the dataset has four actions, and no other.
data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions))
print("how often each code is used:", torch.bincount(data.codes, minlength=args.num_codes).tolist())

# %% 3. Train: a Q network with one output per code. The penalty log sum_k exp Q(s, k) - Q(s, k_data) is a sum of four
# terms. At log 4 = 1.39 the network knows nothing of what the data prefer; lower, it does.
agent = DiscreteCQL(obs_dim=4, vqvae=vqvae, args=args)
log = []
for _ in range(STEPS):
    info = agent.update(data.sample(args.batch_size))
    log.append([info["td_loss"].item(), info["penalty"].item(), info["q_data"].item()])
print("td_loss {:.3f}, penalty {:.3f}, q_data {:.2f}".format(*np.mean(log[-100:], 0)))

# %% What has it learned? Q of every code along the first demonstration, and the policy softmax(Q) that it makes. The
# best code changes from bend to bend, as the demonstrator turned: the penalty alone would clone. Codes are worth more
# near the goal, where the reward is; with more training that part grows, up to 1 / (1 - discount) = 100.
with torch.no_grad():
    q = agent.qf_average(data.obs[:799])  # (799, K)
figure = Figure(figsize=(8, 5), layout="constrained")
above, below = figure.subplots(2, 1, sharex=True)
for k in range(args.num_codes):
    above.plot(q[:, k], color=f"C{k}")
    below.plot(q.softmax(1)[:, k], color=f"C{k}")
above.set_title("Q(s, k) of each code along one demonstration")
below.set(title="the policy: softmax of Q(s, k) over the codes", xlabel="time step")
show(figure, "q_values.png")

# %% 4. Act: draw a code from softmax(Q), decode it in the state at hand. Three episodes at once, from the start of the
# demonstrations. After so few steps not all of them reach the goal; the script trains longer, on better codes.
returns = evaluate(agent, vqvae, make_eval_envs(task.env.spec, 3), episodes=3)
print(f"returns {returns}, score {task.score(returns.mean()):.1f}; the demonstrations score {task.data_score:.1f}")

# %% That is all of it. Next: docs/saq_cql.md for the method, `python saq_cql.py` for the run with its continuous twin.
