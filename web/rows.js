// The rows of LoRA Ensemble are combos one inside the other. The host names the input of a field by the whole way to it,
// "row_2.row_3.lora_3". The widget shows the last part alone, but a node is made as wide as the names of its inputs: 900
// units with 20 rows, over all that stands beside it. And where a workflow is opened, it makes the rows one by one, and
// with each takes the wires off the inputs of all further ones, which are not there yet. Without this file nodes are too
// wide, lose the wires of row 3 and after where a workflow is opened, and work.
import { app } from '../../scripts/app.js'

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

app.registerExtension({
  name: 'LoRAEnsemble.Rows',
  nodeCreated(node) {
    if (node.comfyClass !== 'LoRAEnsembleStack') return
    nameShortly(node)
    keepWires(node)
  }
})
