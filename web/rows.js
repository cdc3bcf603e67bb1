// The rows of LoRA Ensemble are combos one inside the other. The host names the input of a field by the whole way to it,
// "row_2.row_3.lora_3". The widget shows the last part alone, but a node is made as wide as the names of its inputs: 900
// units with 20 rows, over all that stands beside it. And where a workflow is opened, it makes the rows one by one, and
// with each takes the wires off the inputs of all further ones, which are not there yet. And where lists are refreshed, it
// renews that of the first row alone. Without this file nodes are too wide, lose the wires of row 3 and after where a
// workflow is opened, offer new files in the first row alone, and work.
import { app } from '../../scripts/app.js'

const KIND = 'LoRAEnsembleStack'

/** The LoRA files of the last refresh; before one, rows have those of the page. */
let files = null

/** Inputs are named shortly where the width of a node is worked out. */
function nameShortly(node) {
  const size = node.computeSize
  node.computeSize = function (...given) {
    for (const input of this.inputs ?? [])
      if (input.name.includes('.')) input.label ??= input.name.split('.').at(-1)
    return size.apply(this, given)
  }
}

/** What the host takes off a node that it loads waits until all rows are there. */
function keepWires(node) {
  const { configure, removeInput } = node
  node.configure = function (...given) {
    const waiting = []
    this.removeInput = (slot) => waiting.push(...this.inputs.splice(slot, 1))
    try {
      configure.apply(this, given)
    } finally {
      this.removeInput = removeInput
    }
    for (const input of waiting) {
      const slot = this.inputs.findIndex(({ name }) => name === input.name)
      if (slot < 0) this.removeInput(this.inputs.push(input) - 1)
      else if (input.link != null) {
        this.inputs[slot].link = input.link
        const link = this.graph?.getLink(input.link) // none where a node is copied into a subgraph
        if (!link) continue
        link.target_slot = slot
        this.onConnectionsChange?.(window.LiteGraph.INPUT, slot, true, link, this.inputs[slot])
      }
    }
  }
}

function renew(widget) {
  if (files && /(^|\.)lora_\d+$/.test(widget?.name ?? '')) widget.options.values = files
  return widget
}

/** A row that is opened after a refresh has its files, too. */
function keepFiles(node) {
  const add = node.addWidget
  node.addWidget = function (...given) {
    return renew(add.apply(this, given))
  }
}

app.registerExtension({
  name: 'LoRAEnsemble.Rows',
  nodeCreated(node) {
    if (node.comfyClass !== KIND) return
    nameShortly(node)
    keepWires(node)
    keepFiles(node)
  },
  refreshComboInNodes(defs) {
    const [kind, options] = defs[KIND]?.input?.optional?.lora_1 ?? []
    files = Array.isArray(kind) ? kind : (options?.options ?? files)
    const root = app.rootGraph ?? app.graph
    for (const graph of [root, ...(root.subgraphs?.values() ?? [])])
      for (const node of graph._nodes) if (node.comfyClass === KIND) node.widgets?.forEach(renew)
  }
})
