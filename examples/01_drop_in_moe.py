"""Replace the feed-forwards of a small network of your own by mixtures of experts.

python examples/01_drop_in_moe.py
"""

import torch
from torch import nn

import coterie

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = coterie.RMSNorm(dim)
        # Was: self.feed_forward = coterie.GatedMLP(dim, 128)
        self.feed_forward = coterie.MoE(dim, hidden_dim=64, num_experts=8, top_k=2)

    def forward(self, x):
        y, routing = self.feed_forward(self.norm(x))
        return x + y, routing


# Eight linear maps, one per cluster of inputs: a task that experts can divide among themselves.
dim, clusters = 32, 8
centers, maps = 3 * torch.randn(clusters, dim), torch.randn(clusters, dim, dim) / dim**0.5
model = nn.ModuleList([Block(dim), Block(dim)])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(201):
    cluster = torch.randint(clusters, (512,))
    x = centers[cluster] + torch.randn(512, dim)
    target = torch.einsum("td,tde->te", x, maps[cluster])
    y, routings = x, []
    for block in model:
        y, routing = block(y)
        routings.append(routing)
    error = (y - target).square().mean()
    loss = error + 0.01 * coterie.balance_loss(routings) + 1e-3 * coterie.z_loss(routings)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        balance = coterie.balance_loss(routings).item()
        load = routings[0].counts().tolist()
        print(f"step {step:3}  error {error.item():6.3f}  balance loss {balance:.2f} (1 = even)  load {load}")
