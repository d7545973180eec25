"""The table of nodes: small and large ones are alike, and it grows with the units."""

import networks
import torch
import torch.nn.functional as F
from networks import Net
from torch import nn

from cbp_fast.discovery import find_unit_groups
from cbp_fast.discovery.following.following import follow
from cbp_fast.discovery.nodes.nodes import Nodes
from cbp_fast.discovery.nodes.table import QUICK
from cbp_fast.discovery.running.forwards import forwards


def test_a_scan_takes_time_in_proportion(monkeypatch):
    # mixes of mixes were walked anew for each: counted in nodes, which repeat where times do not
    looked_at = []
    leaves = Nodes.leaves
    monkeypatch.setattr(Nodes, "leaves", lambda self, ids: (looked_at.append(len(ids)), leaves(self, ids))[1])

    def forward(m, x):
        u, (b, c), h, ys = F.silu(m.a(x)), m.c(x).chunk(2, -1), 0, []
        for t in range(x.shape[1]):
            h = torch.exp(-F.softplus(m.d(u[:, t]))[..., None]) * h + u[:, t, :, None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return m.b(torch.stack(ys, 1))

    counts = []
    for length in (8, 16, 32):
        model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8), d=nn.Linear(8, 8))
        looked_at.clear()
        find_unit_groups(model, torch.randn(2, length, 6))
        counts.append(sum(looked_at))
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


def test_small_tables_are_kept_as_large_ones_are(monkeypatch):
    """Of few ids Python makes the nodes, of many operations on tensors: the same sets, bare parts and mixes."""
    tables = []
    for quick in (0, QUICK):
        for module in ("nodes", "table"):
            monkeypatch.setattr(f"cbp_fast.discovery.nodes.{module}.QUICK", quick)
        torch.manual_seed(0)
        table = Nodes()
        ids = torch.cat([*(table.source(name, 0, 20) for name in "ab"), table.source("bias", None, 1)])
        for _ in range(30):
            some = [ids[torch.randint(len(ids), (n,))] for n in (6, 6)]
            found = [table.join(*some), table.product(*some), table.with_one(some[0])]
            # one at a time: mixes are numbered as they are made
            for row in ids[torch.randint(len(ids), (4, 1, 5))]:
                row[0, : int(torch.randint(3, ()))] = 0
                found.append(table.merge(row))
            ids = torch.cat([ids, *found])

        def leaves(node, table=table):
            _, found = table.leaves(torch.tensor([node]))
            return sorted(-int(table.mix[leaf]) or int(leaf) for leaf in found)

        tables.append([(leaves(node), leaves(int(table.bare[node]))) for node in ids.tolist()])
        assert len(table.mixes) > 50
    assert tables[0] == tables[1]


def test_the_table_grows_with_the_units_and_not_with_pairs_of_them():
    sizes = []
    for tokens, width in ((8, 16), (80, 160)):
        model = networks.spatial_gate(tokens, width)
        trace = follow(model, forwards(torch.randn(2, tokens, 5)), ())
        sizes.append(trace.nodes.size / sum(source.size for source in trace.nodes.sources))
    assert sizes[1] < 1.2 * sizes[0]
