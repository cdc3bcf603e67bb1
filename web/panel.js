// The panel on a method's node: per LoRA its part in the picture and its strength, step by step. The server sends what
// it shows (host/look/panel.py) over the host's own websocket; without this file everything else works as it does.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const EVENT = 'lora_ensemble.run'
const SETTING = 'LoRAEnsemble.Panel'
const NAME = 'lora_ensemble_panel'
const ROW = 20
const KEPT = 'lora_ensemble' // below which a node's output has what it shows of its run
const MOST = 10 // rows that are seen without scrolling
const LINES = 6 // of a note that are seen
const MARGIN = 10 // around it, in the classic canvas
const SIDES = 36 // by how much it is narrower than its node
const JOINED = ', '

const STYLE = `
.lora-ensemble-panel { box-sizing: border-box; display: flex; flex-direction: column; gap: 2px; padding: 4px 6px;
  overflow: hidden; border-radius: 6px; font: 11px/16px sans-serif; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222) }
.lora-ensemble-panel p { margin: 0; flex: none; color: var(--descrip-text, #999); overflow: hidden;
  overflow-wrap: anywhere }
.lora-ensemble-panel .note { color: var(--input-text, #ddd); display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: ${LINES} }
.lora-ensemble-panel ul { margin: 0; padding: 0; min-height: 0; max-height: ${MOST * ROW}px; list-style: none;
  overflow: hidden auto }
.lora-ensemble-panel li { display: grid; height: ${ROW}px; align-items: center; gap: 6px;
  grid-template-columns: minmax(0, 2fr) minmax(40px, 3fr) 34px 34px; font-variant-numeric: tabular-nums }
.lora-ensemble-panel span { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; text-align: right }
.lora-ensemble-panel span:first-child { text-align: left }
.lora-ensemble-panel .bar { height: 8px; border: 1px solid var(--descrip-text, #999); border-radius: 2px }
.lora-ensemble-panel .bar i { display: block; height: 100%; background: var(--light) }
.dark-theme .lora-ensemble-panel .bar i { background: var(--dark) }`

let language = 'en'
let words = {} // English text -> that of the page's language; what is missing is English
let latest = [] // what was sent last
let running = '' // the workflow whose run was told of last

/** The texts of a language, which the host has of locales/<language>/main.json. */
async function learn(other) {
  language = other // asked for once, whatever comes of it
  try {
    words = (await api.getCustomNodesI18n())[other]?.loraEnsemble ?? {}
  } catch (error) {
    words = {}
    console.warn('LoRA Ensemble: the panel stays in English', error)
  }
}

/** A text in the page's language, with values in its {places}. */
function say(text, values = {}) {
  return (words[text] ?? text).replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place)
}

const sayAll = (parts) => parts.map(([text, values]) => say(text, values)).join(say(JOINED))

/** An element with a class and a text, in another one. */
function put(parent, tag, text = '', name = '') {
  const made = parent.appendChild(document.createElement(tag))
  made.className = name
  made.textContent = text
  return made
}

function row(list, { name, part, strength, light, dark }) {
  const item = put(list, 'li')
  const percent = part === null ? say('at the end') : `${Math.round(100 * part)} %`
  item.setAttribute('aria-label',
    say('{name}: {part}, strength {strength}', { name, part: percent, strength: strength.toFixed(2) }))
  item.title = name
  put(item, 'span', name)
  const bar = put(put(item, 'div', '', 'bar'), 'i')
  bar.style.cssText = `width: ${100 * (part ?? 0)}%; --light: ${light}; --dark: ${dark}`
  put(item, 'span', part === null ? '…' : percent)
  put(item, 'span', strength.toFixed(2))
}

function draw(element, parts) {
  const before = [...element.querySelectorAll('ul')].map((list) => [list.scrollTop, list === document.activeElement])
  element.replaceChildren()
  element.setAttribute('aria-label', say('What each LoRA does'))
  parts.forEach(({ head, rows }, k) => {
    const text = sayAll(head)
    put(element, 'p', text).title = say('{text}; on the right the strength at this step', { text })
    const list = put(element, 'ul')
    rows.forEach((each) => row(list, each))
    if (rows.length <= MOST) return
    list.setAttribute('aria-label', text)
    list.tabIndex = 0 // keys scroll it, and in Nodes 2.0 the wheel does where it has been clicked
    list.dataset.captureWheel = true
    const [place, focused] = before[k] ?? []
    list.scrollTop = place ?? 0
    if (focused) list.focus({ preventScroll: true })
  })
  const foot = sayAll(parts[0].foot)
  put(element, 'p', foot).title = foot
  for (const note of parts[0].notes) put(element, 'p', note, 'note').title = note
  if (parts[0].more.length) put(element, 'p', sayAll(parts[0].more))
}

const root = () => app.rootGraph ?? app.graph
const isOurs = (node) => node?.comfyClass?.startsWith('LoRAEnsemble')

/** The node of an id as the server has it: "12", or "3:12" for node 12 inside the subgraph of node 3. */
function nodeOf(id) {
  const path = String(id).split(':')
  const last = path.pop()
  const find = (graph, part) => graph?.getNodeById(part) ?? graph?.getNodeById(Number(part))
  const graph = path.reduce((outer, part) => find(outer, part)?.subgraph, root())
  return find(graph, last)
}

/** The name of a node among the outputs that the host keeps for the workflow of each tab. */
const place = (node) => node.graph === root() ? String(node.id) : `${node.graph.id}:${node.id}`

/** Whether the run that goes on is in another tab, which has nodes of the same numbers. */
const away = () => !!running && !!root()?.id && running !== root().id

/** Puts more into what is kept of a node: {of, parts, text}. While a tab is opened its outputs are there before its nodes
 * are, so what is kept says of which workflow it is. */
function keep(outputs, name, more, of = root()?.id) {
  const before = outputs[name]?.[KEPT]
  outputs[name] = { ...outputs[name], [KEPT]: { ...(before?.of === of && before), ...more, of } }
}

/** Keeps more of a node with the workflow that it is of, in a tab that is not in sight. */
function keepAway(workflow, node, more) {
  for (const other of app.extensionManager?.workflow?.openWorkflows ?? []) {
    if (!other.changeTracker || other.activeState?.id !== workflow) continue
    other.changeTracker.nodeOutputs ??= {} // by the server's ids, as the host puts pictures there
    keep(other.changeTracker.nodeOutputs, node, more, workflow)
  }
}

/** A text of which the host, which takes it for HTML or for Markdown, makes that text: as host/look/live.py has it. */
const unmarked = (text) => text?.replace(/[&<>[*`~\\]|\b_+|_+\b/g,
  (found) => [...found].map((sign) => `&#${sign.charCodeAt()};`).join('')).replaceAll('\n', '  \n')

/** What a node has given as its text, in the form in which it says it while it runs. */
const given = (output) => unmarked(output?.text?.[0])

/** Has the host show a text on a node that is known of it. */
const speak = (node, text) => api.dispatchCustomEvent('progress_text', { nodeId: String(node.id), text, known: true })

/** What is kept of the workflow in sight is on its nodes again, which were made anew: the host calls this where it has
 * pictures come back, and after an undo. */
function restore(outputs = app.nodeOutputs) {
  const seen = root()
  for (const graph of seen ? [seen, ...(seen.subgraphs?.values() ?? [])] : []) {
    for (const node of graph.nodes.filter(isOurs)) {
      const output = outputs?.[place(node)]
      const kept = output?.[KEPT]
      const { parts, text = given(output) } = kept?.of === seen.id ? kept : {}
      const again = () => parts && app.extensionManager?.setting?.get(SETTING) && show(node, parts)
      again() // first, and once more with the text, as in a run: a panel knows the height before both, and with both
      if (text && graph === app.canvas?.graph) speak(node, text)
      again()
    }
  }
}

/** The widget of a node's panel, made where there is none. Its element knows how high it is to be. */
function panelOf(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME)
  if (found) return found
  const element = document.createElement('div')
  element.className = 'lora-ensemble-panel'
  element.setAttribute('role', 'group')
  const height = () => Number(element.dataset.height)
  const before = node.size[1]
  const panel = node.addDOMWidget(NAME, NAME, element,
    { serialize: false, getMinHeight: height, getMaxHeight: height })
  panel.serialize = false
  // A workflow is saved as it is without the panel, which is there for the session alone: with what a user has made the
  // node higher since, and nothing of what the panel has.
  const saved = node.onSerialize
  node.onSerialize = function (data) {
    saved?.call(this, data)
    if (node.widgets?.includes(panel))
      data.size = [data.size[0], before + Math.max(0, data.size[1] - Number(element.dataset.grown))]
  }
  const resized = node.onResize
  let width = node.size[0]
  node.onResize = function (...given) {
    resized?.apply(this, given)
    if (this.size[0] === width || window.LiteGraph?.vueNodesMode || !this.widgets?.includes(panel)) return
    width = this.size[0]
    fit(this, element)
    const more = this.computeSize()[1] - this.size[1]
    if (more <= 0) return
    element.dataset.grown = Number(element.dataset.grown) + more
    this.setSize([width, this.size[1] + more])
  }
  return panel
}

/** The height that a panel needs at a width. */
function tall(element, width) {
  const copy = document.body.appendChild(element.cloneNode(true))
  copy.style.cssText = `position: absolute; visibility: hidden; height: auto; width: ${width}px`
  const height = copy.offsetHeight
  copy.remove()
  return height
}

/** Gives a panel the height that it needs on a node as wide as it is. */
function fit(node, element) {
  element.dataset.height = tall(element, node.size[0] - SIDES) + 2 * MARGIN
}

function show(node, parts) {
  const panel = panelOf(node)
  panel.parts = parts
  draw(panel.element, parts)
  fit(node, panel.element)
  const least = window.LiteGraph?.vueNodesMode ? 0 : node.computeSize()[1] // Nodes 2.0 makes room by itself
  if (least > node.size[1]) node.setSize([node.size[0], least])
  const grown = () => { panel.element.dataset.grown = node.size[1] }
  grown()
  if (window.LiteGraph?.vueNodesMode) setTimeout(grown, 200) // by then it has made the room
  node.setDirtyCanvas?.(true, true)
}

function showAll() {
  for (const id of new Set(latest.map((part) => part.node))) {
    const node = nodeOf(id)
    if (!node?.addDOMWidget || !isOurs(node)) continue
    const parts = latest.filter((part) => part.node === id)
    show(node, parts)
    keep(app.nodeOutputs, place(node), { parts })
  }
}

function told({ detail: { panels, workflow } }) {
  running = workflow
  const settings = app.extensionManager?.setting
  if (!settings?.get(SETTING)) return
  latest = away() ? [] : panels
  if (away())
    for (const { node } of panels) keepAway(workflow, node, { parts: panels.filter((part) => part.node === node) })
  showAll() // at once, since a panel remembers the height that its node had before
  const wanted = settings.get('Comfy.Locale') ?? 'en'
  if (wanted !== language) learn(wanted).then(showAll)
}

/** The text of a node of ours is kept with the panel. */
function said({ detail: { nodeId, text, known } }) {
  if (known) return
  if (away()) return keepAway(running, nodeId, { text })
  const node = nodeOf(nodeId)
  if (isOurs(node)) keep(app.nodeOutputs, place(node), { text })
}

/** What a node gives takes the place of all that the host keeps of it, but not of what stands on it. Where it comes from
 * the server's cache, the node does not run, and says nothing by itself. */
function executed({ detail: { node: id, display_node: seen, output } }) {
  const node = nodeOf(seen ?? id)
  if (!isOurs(node)) return
  const widget = (part) => node.widgets?.find(({ name }) => name.includes(part))
  const { parts } = widget(NAME) ?? {}
  const { value: text } = widget('text-preview') ?? {}
  if (parts) keep(app.nodeOutputs, place(node), { parts })
  if (text) keep(app.nodeOutputs, place(node), { text })
  else if (given(output) && node.graph === app.canvas?.graph) speak(node, given(output))
}

app.registerExtension({
  name: 'LoRAEnsemble.Panel',
  settings: [{
    id: SETTING,
    name: 'Show what each LoRA does on the node that composes',
    category: ['LoRA Ensemble', 'Panel', 'Show'],
    type: 'boolean',
    defaultValue: true
  }],
  setup() {
    put(document.head, 'style', STYLE)
    api.addEventListener(EVENT, told)
    api.addEventListener('progress_text', said)
    api.addEventListener('execution_start', () => { running = '' })
    api.addEventListener('executed', executed)
  },
  afterConfigureGraph: () => restore(),
  onNodeOutputsUpdated: restore
})
