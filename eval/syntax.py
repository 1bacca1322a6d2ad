"""Code without what cannot change what it does, for the keys of artifacts."""

import ast
from collections.abc import Iterator
from typing import Any


def normalize(tree: ast.AST) -> str:
    """The code of a syntax tree without what cannot change what it does.

    Comments, docstrings, annotations of functions, texts of errors and descriptions of fields are left out;
    local variables and positional arguments are numbered. The tree itself is changed.
    """
    return ast.unparse(_Normalizer().visit(tree))


class _Normalizer(ast.NodeTransformer):
    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # of the functions around: name -> number
        self.depth = 0  # how many numbers are in use

    def visit(self, node: ast.AST) -> Any:
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                rest = [s for s in statements if not _is_text(s)]
                setattr(node, field, rest or ([ast.Pass()] if field == "body" else []))
        return super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Any:
        node.name = self.names.get(node.name, node.name)
        node.returns, node.type_comment = None, None
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        return self._function(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return self._function(node)

    def _function(self, node: Any) -> Any:
        """Defaults are of the scope around; arguments and local variables get the next free numbers."""
        node.args.defaults = [self.visit(value) for value in node.args.defaults]
        node.args.kw_defaults = [value and self.visit(value) for value in node.args.kw_defaults]
        outer, depth = self.names, self.depth
        self.names = dict(outer)
        keywords = [argument.arg for argument in node.args.kwonlyargs]  # callers write these names
        for name in keywords:
            self.names[name] = name
        for name in dict.fromkeys(_bound(node)):
            if name not in keywords:
                self.names[name], self.depth = f"_{self.depth}", self.depth + 1
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.arg, argument.annotation = self.names[argument.arg], None
        is_lambda = isinstance(node, ast.Lambda)
        node.body = self.visit(node.body) if is_lambda else [self.visit(part) for part in node.body]
        self.names, self.depth = outer, depth
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        """Names in the body of a class are attributes: they are kept."""
        outer = self.names
        taken = {n.id for s in node.body for n in ast.walk(s) if isinstance(n, ast.Name) and _stores(n)}
        taken |= {s.name for s in node.body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))}
        node.name = outer.get(node.name, node.name)
        self.names = {name: number for name, number in outer.items() if name not in taken}
        self.generic_visit(node)
        self.names = outer
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        node.name = self.names.get(node.name, node.name) if node.name else None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """A field of a class keeps its type, a variable loses it."""
        if isinstance(node.target, ast.Name) and node.target.id in self.names and node.value is not None:
            return self.visit(ast.Assign([node.target], node.value, lineno=node.lineno))
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        """What ends in an error makes nothing: its text may change."""
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        node.exc, node.cause = kind and self.visit(kind), None
        return node

    def visit_Assert(self, node: ast.Assert) -> Any:
        node.test, node.msg = self.visit(node.test), None
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "Field":
            node.keywords = [word for word in node.keywords if word.arg not in ("description", "title")]
        return self.generic_visit(node)


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a text that stands alone as a comment."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _stores(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _bound(function: Any) -> Iterator[str]:
    """The names that a function binds, in their order: arguments, variables, functions inside it."""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            yield argument.arg
    stack = list(reversed(function.body)) if isinstance(function.body, list) else [function.body]
    shared = {
        name
        for node in ast.walk(function)
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and _stores(node) and node.id not in shared:
            yield node.id
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
        stack += reversed(list(ast.iter_child_nodes(node)))
