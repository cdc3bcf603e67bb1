// The rows of LoRA Ensemble are combos one inside the other, and the host names the input of a field by the whole way
// to it, "row_2.row_3.lora_3". The widget shows the last part alone, but a node is made as wide as the names of its
// inputs: 900 units with 20 rows, over all that stands beside it. Without this file nodes are too wide, and work.
import { app } from '../../scripts/app.js'

app.registerExtension({
  name: 'LoRAEnsemble.Rows',
  nodeCreated(node) {
    if (node.comfyClass !== 'LoRAEnsembleStack') return
    const size = node.computeSize
    node.computeSize = function (...given) {
      for (const input of this.inputs ?? [])
        if (input.name.includes('.')) input.label ??= input.name.split('.').at(-1)
      return size.apply(this, given)
    }
  }
})
