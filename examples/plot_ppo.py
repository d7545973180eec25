"""
PPO in one file
===============

As CleanRL writes it: one agent with an actor and a critic, one optimizer, one loop. Each network gets an object;
rollouts run under ``no_grad`` and are not observed, and each minibatch's update is a step. The task is to keep a ball
near the middle by pushes to the left and right, whose sides are exchanged every 15 iterations.
"""

# %%

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Categorical

import cbp_fast

torch.set_num_threads(1)
NUM_ENVS, NUM_STEPS, EPOCHS, MINIBATCHES, ITERATIONS = 8, 32, 4, 4, 45
GAMMA, LAMBDA, CLIP = 0.95, 0.95, 0.2


class Balls:
    """Environments with a ball each, which is pushed to the left or right."""

    def __init__(self):
        self.state, self.sign = torch.zeros(NUM_ENVS, 2), 1

    def step(self, action):
        position, speed = self.state.unbind(1)
        speed = (
            0.9 * speed
            + 0.4 * self.sign * (action.float() - 0.5)
            + 0.1 * torch.randn_like(speed)
        )
        self.state = torch.stack([(position + speed).clamp(-2, 2), speed], 1)
        return self.observation(), -self.state[:, 0].abs()

    def observation(self):
        return torch.cat([self.state, self.state.square()], 1)


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(
            nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )
        self.actor = nn.Sequential(
            nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def get_action_and_value(self, x, action=None):
        policy = Categorical(logits=self.actor(x))
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action), policy.entropy(), self.critic(x).squeeze(-1)


# %%
# The few lines of continual backprop. A threshold of 100 steps is some six iterations of 16 updates.


def train(continual):
    torch.manual_seed(0)
    agent, envs = Agent(), Balls()
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    attached = []
    if continual:
        # with Tanh's gain: the activation function is not detected
        rule = cbp_fast.Rule.nature(act="tanh")
        options = {"rule": rule, "replacement_rate": 1e-3, "maturity_threshold": 100}
        for seed, network in enumerate((agent.actor, agent.critic)):
            cbp = cbp_fast.ContinualBackprop(network, optimizer, seed=seed, **options)
            attached.append(cbp)

    observations = torch.zeros(NUM_STEPS, NUM_ENVS, 4)
    actions, log_probs, rewards, values = (torch.zeros(NUM_STEPS, NUM_ENVS) for _ in range(4))
    observation, returns = envs.observation(), []
    for iteration in range(ITERATIONS):
        envs.sign = -1 if iteration // 15 % 2 else 1
        for t in range(NUM_STEPS):
            observations[t] = observation
            with torch.no_grad():
                act = agent.get_action_and_value(observation)
                actions[t], log_probs[t], _, values[t] = act
            observation, rewards[t] = envs.step(actions[t])
        returns.append(rewards.mean().item())

        with torch.no_grad():
            following = agent.critic(observation).squeeze(-1)
        advantages, last = torch.zeros_like(rewards), torch.zeros(NUM_ENVS)
        for t in reversed(range(NUM_STEPS)):
            delta = rewards[t] + GAMMA * following - values[t]
            last = delta + GAMMA * LAMBDA * last
            advantages[t], following = last, values[t]
        flat = [
            x.flatten(0, 1)
            for x in (observations, actions, log_probs, advantages, advantages + values)
        ]
        for _ in range(EPOCHS):
            for batch in torch.randperm(NUM_ENVS * NUM_STEPS).chunk(MINIBATCHES):
                x, action, old, advantage, target = (data[batch] for data in flat)
                _, log_prob, entropy, value = agent.get_action_and_value(x, action)
                ratio = (log_prob - old).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                loss = loss + 0.5 * (value - target).square().mean() - 0.01 * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    return returns, attached


plain, _ = train(continual=False)
continual, (actor, critic) = train(continual=True)
print("actor", actor.num_replaced, "critic", critic.num_replaced)

# %%
# Two exchanges are far too few to lose plasticity, and the curves should not differ by more than chance: the example
# shows where the lines go. :doc:`/limits` says what to measure first.

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(plain, label="PPO")
axes.plot(continual, label="PPO with continual backprop")
for exchange in range(15, ITERATIONS, 15):
    axes.axvline(exchange, color="grey", linewidth=0.5)
axes.set(xlabel="iteration", ylabel="mean reward")
axes.legend()
plt.show()
