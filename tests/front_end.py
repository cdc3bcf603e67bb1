"""ComfyUI's front end in a real browser: workflows opened as a user opens them, and what stands there.

    with Browser(tmp_path, find_chromium()) as browser:
        page = FrontEnd(browser, server, nodes_2=True)
        page.open_template("flux_routed")
        page.nodes()
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from lora_ensemble.tests.browser import Browser
from lora_ensemble.tests.server import HTTP, PACK, Server

READY = "!!(window.app?.graph?._nodes.length && app.extensionManager?.spinner === false)"
"""The host has opened a workflow of its own, as it does where a page is new, and its start is over."""
NO_FAULT = ("Failed to load resource", "Content Security Policy", "violates", "Refused to connect",
            "ComfyApp graph accessed before initialization", "Subgraph not found")
"""What the host's page says where a user has no files and no settings yet, and 1.45 at each step inside a subgraph."""

SETTLED = """new Promise(async done => {
  const seen = () => JSON.stringify(app.graph._nodes.map(n => [n.id, n.pos[0], n.pos[1], n.size[0], n.size[1],
    document.querySelector(`[data-node-id="${n.id}"]`)?.offsetHeight,
    (n.widgets ?? []).map(w => [w.element?.clientWidth, w.element?.clientHeight,
      w.element?.firstElementChild?.scrollHeight])]))
  let before = '', same = 0
  for (let i = 0; i < 100 && same < 3; i++) {
    app.canvas.draw(true, true)
    await new Promise(next => requestAnimationFrame(() => setTimeout(next, 50)))
    const now = seen()
    same = now === before ? same + 1 : 0
    before = now
  }
  done(app.graph._nodes.map(n => n.type).sort())
})"""

OPEN = """(async () => {
  const graph = %s
  await app.loadGraphData(graph, true, true, %s, {openSource: 'template'})
  return %s
})()"""

NODES = r"""(() => {
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
  const scrolls = e => e.clientHeight > 0 && seen(e) && e.scrollHeight > e.clientHeight + 1
    && (e.tagName === 'TEXTAREA' || ['auto', 'scroll'].includes(getComputedStyle(e).overflowY))
  const all = e => [e, ...e.querySelectorAll('*')]
  const draw = CanvasRenderingContext2D.prototype.fillText
  const drawn = node => {
    const texts = []
    CanvasRenderingContext2D.prototype.fillText = text => texts.push(String(text))
    app.canvas.ctx.save()
    try { app.canvas.drawNode(node, app.canvas.ctx) } finally {
      CanvasRenderingContext2D.prototype.fillText = draw
      app.canvas.ctx.restore()
    }
    return texts
  }
  const short = node => {  // where there is little room the name of a widget is left out; files have any name
    const texts = drawn(node), cut = texts.filter(text => text.includes('\u2026'))
    const kinds = ['number', 'combo', 'text', 'toggle']
    const widgets = (node.widgets ?? []).filter(w => kinds.includes(w.type) && !w.hidden)
    const named = widgets.filter(w => !String(w.value).endsWith('.safetensors'))
    return Math.max(0, cut.length - (widgets.length - named.length))
      + (cut.length ? 0 : named.filter(w => !texts.includes(w.label ?? w.name)).length)
  }
  const roomy = node => {
    const width = node.size[0]
    node.size[0] = %d
    while (short(node) && node.size[0] < %d) node.size[0] += 10
    const enough = node.size[0]
    node.size[0] = width
    return enough + (enough > %d ? 10 : 0)
  }
  return JSON.stringify(app.graph._nodes.map(n => {
    const card = document.querySelector(`[data-node-id="${n.id}"]`)
    const parts = card ? all(card) : (n.widgets ?? []).flatMap(w => w.element ? all(w.element) : [])
    const below = card ? Math.max(...all(card).map(e => e.getBoundingClientRect().bottom)) : 0
    return {
      id: Number(n.id), kind: n.type, title: n.title ?? '', known: n.type in LiteGraph.registered_node_types,
      x: n.pos[0], y: n.pos[1], width: card ? card.offsetWidth : n.size[0],
      height: card ? card.offsetHeight - LiteGraph.NODE_TITLE_HEIGHT : n.size[1],
      footer: card ? (below - card.getBoundingClientRect().bottom) / app.canvas.ds.scale : 0,
      hidden: Math.max(0, ...parts.filter(scrolls).map(e => e.scrollHeight - e.clientHeight)),
      writable: (n.widgets ?? []).some(w => w.type === 'customtext'),
      roomy: card ? 0 : roomy(n),
      drawn: card ? '' : drawn(n).join(' '), short: card ? 0 : short(n),
      cut: parts.filter(e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1 && e.textContent.trim()
        && getComputedStyle(e).overflowX === 'hidden').map(e => e.textContent.trim())
    }
  }))
})()"""
SEARCH = """document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
  .nodeSearchService.searchNode(%s, []).map(node => [node.name, node.display_name])"""

RUN = """(async () => {
  const { api } = await import('/scripts/api.js')
  const seen = window.seen = {texts: {}, panels: [], over: ''}
  const once = (list, text) => text && !list.includes(text) && list.push(text)
  const look = () => {
    for (const node of app.graph._nodes) {
      const shown = node.widgets?.find(widget => widget.name.includes('text-preview'))?.value
      once(seen.texts[node.type] ??= [], shown)
    }
    document.querySelectorAll('.lora-ensemble-panel').forEach(panel => once(seen.panels, panel.innerText))
  }
  for (const told of ['progress_text', 'lora_ensemble.run']) api.addEventListener(told, look)
  const end = what => { look(); seen.over ||= what }
  api.addEventListener('execution_success', () => end('success'))
  api.addEventListener('execution_error', error => end(error.detail.exception_message))
  await app.queuePrompt(0)
})()"""
PICTURE = """(() => {
  const node = app.graph._nodes.find(node => node.type === %s)
  return node.imgs?.length || document.querySelectorAll(`[data-node-id="${node.id}"] img`).length
})()"""
NARROWEST, WIDEST = 240, 420  # widths of nodes that are tried


@dataclass(frozen=True)
class Shown:
    """A node as it stands on the canvas, in the units of its workflow."""

    id: int
    kind: str
    title: str
    known: bool
    """Whether the front end has a node of this type."""
    x: float
    y: float
    width: float
    height: float
    """Without the title bar, which lies above y."""
    footer: float
    """Height of the buttons that hang below the node in Nodes 2.0."""
    hidden: float
    """How much of a text one must scroll to, at most."""
    writable: bool
    """Whether it has a box to write several lines into."""
    roomy: float
    """The width in which no text of it is cut off, from NARROWEST to WIDEST; 0 in Nodes 2.0."""
    drawn: str
    """All that it writes on the canvas (classic)."""
    short: int
    """How many texts are cut off or left out, but for names of files (classic)."""
    cut: list[str]
    """Texts that do not fit their places in width (Nodes 2.0)."""

    @property
    def squeezed(self) -> list[str]:
        """The texts of `cut` but for names of files, which are as long as users make them."""
        return [text for text in self.cut if not text.endswith(".safetensors")]


class FrontEnd:
    """The page of a running server, in the classic canvas or in Nodes 2.0."""

    def __init__(self, browser: Browser, server: Server, nodes_2: bool) -> None:
        self.browser, self.server, self.nodes_2 = browser, server, nodes_2
        self.set("Comfy.VueNodes.Enabled", nodes_2)
        self.set("Comfy.TutorialCompleted", True)
        self.set("Comfy.Minimap.Visible", False)
        self.set("Comfy.Workflow.Persist", False)
        self.set("LiteGraph.Canvas.MinFontSizeForLOD", 0)  # texts are laid out at every zoom
        self.load()

    def load(self) -> None:
        """The page anew."""
        browser = self.browser
        browser.open(f"http://127.0.0.1:{self.server.port}")
        browser.wait_for("document.readyState === 'complete'")
        browser.wait_for(READY, seconds=300)
        browser.evaluate("document.fonts.ready.then(() => true)")
        browser.evaluate(SETTLED)

    def set(self, name: str, value: Any) -> None:
        """A setting of the front end, as it is kept on the server."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/settings/{name}", data=json.dumps(value).encode(), method="POST",
            headers={"Content-Type": "application/json"},
        )
        with HTTP.open(request, timeout=60):
            pass

    def open_graph(self, graph: dict[str, Any], name: str) -> None:
        """Opens a workflow as one of the template browser, an app as the graph that it is."""
        kinds = sorted(node["type"] for node in graph["nodes"])
        graph = graph | {"extra": {name: value for name, value in graph["extra"].items() if name != "linearMode"}}
        shown = self.browser.evaluate(OPEN % (json.dumps(graph), json.dumps(name), SETTLED))
        assert shown == kinds, f"the front end does not show the nodes of '{name}'"

    def open_template(self, name: str) -> None:
        """Opens one of the pack's templates, read from the server."""
        self.open_graph(self.server.json(f"/api/workflow_templates/{PACK}/{name}.json"), name)

    def nodes(self) -> list[Shown]:
        return [Shown(**entry) for entry in json.loads(self.browser.evaluate(NODES % (NARROWEST, WIDEST, NARROWEST)))]

    def groups(self) -> list[tuple[str, float, float, float, float]]:
        """(title, x, y, width, height) of each group."""
        return self.browser.evaluate("app.graph._groups.map(group => [group.title, ...group._bounding])")

    def run(self, seconds: float = 300.0) -> dict[str, Any]:
        """Queues the workflow as the button does, and says what was seen until it was done: the texts on nodes by their
        types, what the panels of the pack had written on them, and "success" or an error (`over`)."""
        self.browser.evaluate(RUN)
        self.browser.wait_for("seen.over", seconds)
        self.browser.evaluate(SETTLED)
        return json.loads(self.browser.evaluate("JSON.stringify(seen)"))

    def shows_a_picture(self, kind: str) -> bool:
        """Whether the first node of a type does, in a while."""
        return bool(self.browser.wait_for(PICTURE % json.dumps(kind)))

    def search(self, words: str) -> list[tuple[str, str]]:
        """(type, name) of the nodes that the search for nodes finds, best first."""
        return self.browser.evaluate(SEARCH % json.dumps(words))

    def saved(self) -> list[Any]:
        """What a file of the workflow would say of its nodes' sizes and values; a seed is another after each run."""
        return json.loads(self.browser.evaluate(
            "JSON.stringify(app.graph.serialize().nodes.filter(node => node.type.startsWith('LoRAEnsemble'))"
            ".map(node => [node.id, [...node.size].map(Math.round), node.widgets_values]))"))

    def zoom(self) -> float:
        return self.browser.evaluate("app.canvas.ds.scale")

    def complaints(self) -> list[str]:
        """Errors on the console that are not the host's own about files and settings that a fresh one lacks."""
        return [text for text in self.browser.complaints
                if not any(word in text for word in NO_FAULT) or f"/extensions/{PACK}" in text]
