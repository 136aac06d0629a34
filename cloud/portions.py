"""Which blocks fit one commit: their texts, and the dates that their rows lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cloud.rows import TEXT_BYTES_MAX, date_span, event_dates, text_bytes, text_bytes_bound
from cloud.stacks import Block, Stack, stacked
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.stream import StreamContract

DATES_PER_COMMIT = 64
"""Each date of a commit is a file; blocks that together have more dates are stored in several commits."""

ContractOf = Callable[[BlockHeader], StreamContract]


def portions(stacks: Sequence[Stack], contract_of: ContractOf) -> Iterator[list[Stack]]:
    """The blocks of one table, in groups that fit one commit each: usually one, and that is seen without a look at each block."""
    if not stacks or _fit(stacks, contract_of):
        yield from [list(stacks)] if stacks else []
        return
    blocks = [block for stack in stacks for block in stack.blocks()]
    dates = {header.identity: event_dates(contract_of(header), table) for header, table in blocks}
    portion: list[Block] = []
    size, joined = 0, set[int]()
    for header, table in sorted(blocks, key=lambda found: min(dates[found[0].identity])):
        more, own = text_bytes(header, table), dates[header.identity]
        if portion and (size + more > TEXT_BYTES_MAX or len(joined | own) > DATES_PER_COMMIT):
            yield stacked(portion)
            portion, size, joined = [], 0, set()
        portion.append((header, table))
        size, joined = size + more, joined | own
    yield stacked(portion)


def _fit(stacks: Sequence[Stack], contract_of: ContractOf) -> bool:
    """Whether all of it surely fits one commit."""
    if sum(map(text_bytes_bound, stacks)) > TEXT_BYTES_MAX:
        return False
    spans = [date_span(contract_of(stack.headers[0]), stack.table) for stack in stacks]
    return max(last for _, last in spans) - min(first for first, _ in spans) < DATES_PER_COMMIT
