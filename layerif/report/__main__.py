from layerif.report import main

main()
