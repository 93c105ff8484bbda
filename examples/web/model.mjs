// The page's side of worker.mjs: each operation is a promise.

export class Model {
  /** `onProgress({done, total})` in bytes while loading; `onPreparing(role)` when a graph is made ready. */
  constructor({ onProgress, onPreparing }) {
    this.waiting = new Map();
    this.next = 0;
    this.worker = new Worker(new URL('./worker.mjs', import.meta.url), { type: 'module' });
    this.worker.onmessage = ({ data: { id, result, error, progress, preparing } }) => {
      if (progress) return onProgress(progress);
      if (preparing) return onPreparing(preparing);
      const { resolve, reject } = this.waiting.get(id);
      this.waiting.delete(id);
      return error === undefined ? resolve(result) : reject(new Error(error));
    };
    this.worker.onerror = (event) => {
      const reason = new Error(`the model's thread could not start${event.message ? ` (${event.message})` : ''}; try again`);
      for (const { reject } of this.waiting.values()) reject(reason);
      this.waiting.clear();
    };
  }

  ask(op, request = {}, transfer = []) {
    return new Promise((resolve, reject) => {
      const id = this.next++;
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, op, ...request }, transfer);
    });
  }

  close() {
    this.worker.terminate();
  }
}

/** Runs `work` for the newest request alone: what comes while it runs replaces what waits. */
export function newestOnly(work) {
  let running = false, waiting = false;
  return async function request() {
    waiting = true;
    if (running) return;
    running = true;
    try {
      while (waiting) {
        waiting = false;
        await work();
      }
    } finally {
      running = false;
    }
  };
}
