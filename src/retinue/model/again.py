"""What of a recorded router is done again where a policy replaces its choice.

Everything after its `topk`, on the same memory, with the policy's indices in the place of the
router's. That gives what the router would have given had it chosen so itself, as long as nothing
changes what was there before the `topk`; a router that does is refused.
"""

from collections.abc import Sequence

from retinue.errors import Unsupported
from retinue.model.record import Operation, aten


def repeated(before: Sequence[Operation], routed: Operation) -> list[Operation]:
    """The operations that follow once the indices were replaced; `before` came before `routed`.

    The first one looks up the values that the `topk` would have given. Raises Unsupported.
    """
    scores, values, indices, *_ = routed.args
    copies = {ref.source for ref in routed.args[5:]}
    after: list[Operation] = []
    for operation in reversed(before):
        given = {ref.source for ref in operation.outputs}
        if operation.function is aten.topk.default and indices.source in given:
            break
        if not copies & given:
            after.append(operation)
    else:
        raise Unsupported("a router's choice does not come from its topk")
    made = {values.source, indices.source}
    for operation in reversed(after):
        made |= {ref.source for ref in operation.outputs} - _seen(operation)
        if not operation.changes <= made or operation.module is not None:
            raise Unsupported("a router changes what it chose by")
    return [Operation(aten.gather.default, (scores, -1, indices), {}, (values,)), *reversed(after)]


def _seen(operation: Operation) -> set[int]:
    return {ref.source for ref in operation.inputs}
