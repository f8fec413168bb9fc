// Everything is in the page already; this only shows one neuron and one step of the slider at a time.
document.documentElement.classList.add('js')

for (const look of document.querySelectorAll('.look')) {
  const [picks, heats, panels, steps] = ['.pick', '.heat', '.panel', '.step'].map(name => [...look.querySelectorAll(name)])
  const hint = look.querySelector('.hint'), slider = look.querySelector('input')

  function choose(chosen) {
    picks.forEach((pick, i) => {
      pick.setAttribute('aria-pressed', i === chosen)
      heats[i].hidden = panels[i].hidden = i !== chosen
    })
    look.classList.toggle('plain', chosen < 0)
    hint.hidden = chosen >= 0
  }

  function move() {
    const at = +slider.value
    steps.forEach((step, i) => { step.hidden = i !== at })
    slider.setAttribute('aria-valuetext', steps[at].dataset.said)
    look.style.setProperty('--at', at/slider.max)
  }

  picks.forEach((pick, i) => {
    pick.addEventListener('click', () => choose(pick.getAttribute('aria-pressed') === 'true' ? -1 : i))
    pick.addEventListener('keydown', event => {
      const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key]
      if (!by) return
      event.preventDefault()
      picks[(i + by + picks.length) % picks.length].focus()
    })
  })
  slider.addEventListener('input', move)
  slider.value = 0
  choose(0)
  move()
}
